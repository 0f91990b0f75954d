"""The registry of model families. A plugin may add an entry; the key is the Family's name."""

from models.config import Family
from models.dream import DREAM
from models.llada import LLADA
from models.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, DREAM, QWEN2)}

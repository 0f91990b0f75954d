"""What is asked and how it is scored: the four benchmarks, their prompt forms, answer clean-up, the sandbox."""

from tasks.base import PromptForm, TaskSpec, build_task
from tasks.data import Data, DataError, Source, check_data, data_checksums, load_data

__all__ = [
    "Data",
    "DataError",
    "PromptForm",
    "Source",
    "TaskSpec",
    "build_task",
    "check_data",
    "data_checksums",
    "load_data",
]

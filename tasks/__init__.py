"""The benchmarks: data, prompt forms, the clean-up of answers and their scoring."""

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

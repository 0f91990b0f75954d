"""What is asked and how it is scored: the four benchmarks, their prompt forms, answer clean-up, the sandbox."""

from tasks.base import Data, DataError, PromptForm, TaskSpec, build_task, check_data, data_checksums

__all__ = ["Data", "DataError", "PromptForm", "TaskSpec", "build_task", "check_data", "data_checksums"]

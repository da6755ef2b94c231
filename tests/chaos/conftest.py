"""The tiny runs and jobs of the other folders, to be disturbed."""

from tests.pipeline.conftest import job_inputs, make_job
from tests.train.conftest import make_config, model_dir, store_dir, two

__all__ = ["job_inputs", "make_config", "make_job", "model_dir", "store_dir", "two"]

"""Alpha MAML: model-agnostic meta-learning with online adaptation of both learning rates.

A thin module behind a reproducibility book for Behl, Baydin and Torr (2019), arXiv 1905.07435.
"""

from amaml.alpha_maml import MetaState, evaluate, init_state, meta_step
from amaml.config import RunConfig
from amaml.data import Characters, Split, load_glyphs, load_omniglot, split_characters
from amaml.maml import adapt, meta_gradient, predict
from amaml.model import OmniglotCNN
from amaml.runs.run import Run, load_run
from amaml.sweep import run_all
from amaml.tasks import Tasks, TaskSampler
from amaml.training import train

__version__ = "0.2.0"
__all__ = [
    "Characters",
    "MetaState",
    "OmniglotCNN",
    "Run",
    "RunConfig",
    "Split",
    "TaskSampler",
    "Tasks",
    "adapt",
    "evaluate",
    "init_state",
    "load_glyphs",
    "load_omniglot",
    "load_run",
    "meta_gradient",
    "meta_step",
    "predict",
    "run_all",
    "split_characters",
    "train",
]

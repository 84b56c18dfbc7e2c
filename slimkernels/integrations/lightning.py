"""Lightning: a callback that replaces a model's modules before training, testing or predicting."""

from __future__ import annotations

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        raise ImportError(
            "slimkernels.integrations.lightning needs lightning (or pytorch_lightning), and found "
            "neither"
        ) from None

from slimkernels.integrations.replace import replace, restore


class Slimkernels(Callback):
    """``Trainer(callbacks=[Slimkernels()])`` runs slimkernels.replace on the module at setup.

    Before the strategy wraps the module and the optimizers are made; parameters stay the same.

    restore_after  restore the module at teardown, also from a replace before this one
    report         what replace returned, once setup has run
    """

    def __init__(self, *, restore_after: bool = False) -> None:
        self.restore_after = restore_after
        self.report = None

    def setup(self, trainer, pl_module, stage: str) -> None:
        self.report = replace(pl_module)

    def teardown(self, trainer, pl_module, stage: str) -> None:
        if self.restore_after:
            restore(pl_module)

"""What both train scripts share: the pretext task, augmentation, the input pipeline, checkpoints, metrics, reports."""

__all__ = ["MemoryBank"]


def __getattr__(name: str):
    # Imported on demand: the train scripts read their arguments from this package before torch is loaded.
    if name == "MemoryBank":
        from .memory_bank import MemoryBank

        return MemoryBank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

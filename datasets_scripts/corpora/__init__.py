"""The corpora. Every module in this folder defines one, or several, as named subclasses of `Corpus`.

They are found by themselves, and import nothing heavy: a command's help lists their names.
"""

from importlib import import_module
from pkgutil import iter_modules

from ..corpus import CORPORA

for _module in iter_modules(__path__):
    import_module(f".{_module.name}", __name__)

# In the order of every list; a new one follows by itself.
CORPUS_NAMES = list(
    dict.fromkeys(["esc10", "esc50", "urbansound8k", "dcase2013", "synthetic", "audiofolder", "hub", *CORPORA])
)

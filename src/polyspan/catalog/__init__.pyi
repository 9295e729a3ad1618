from ._entries import FAMILIES as FAMILIES
from ._entries import Entry as Entry
from ._entries import entries as entries
from ._entries import entry as entry
from ._entries import search as search

# SPDX-License-Identifier: Apache-2.0
"""The steps of a run: what is there, which of them are live, and which are pinned."""

from .entries import Catalogue as Catalogue
from .entries import Entry as Entry
from .entries import EntryState as EntryState
from .examine import is_damaged_now as is_damaged_now
from .examine import is_intact_again as is_intact_again
from .examine import is_still_damaged as is_still_damaged
from .examine import make_foreign_entry as make_foreign_entry
from .examine import were_deleted as were_deleted
from .listing import MAX_LISTINGS as MAX_LISTINGS
from .listing import add_metrics as add_metrics
from .listing import add_step as add_step
from .listing import examine_step as examine_step
from .listing import is_live as is_live
from .listing import list_spares as list_spares
from .listing import scan as scan
from .pins import has_intact_pins as has_intact_pins
from .pins import read_pins as read_pins
from .pins import write_pins as write_pins

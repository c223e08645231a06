"""Names of the files of a training stage."""

from pipelines.store.ledger import DETAILS

# Written last and not committed: it holds timings, and says that all that is committed is complete.
DETAILS_FILE = DETAILS
HISTORY_FILE = "history.json"
TRAIN_FOLDER = "train"
# Their contents depend on how often something is logged.
LOGS = (HISTORY_FILE, "previews/")

"""Names of the files of a training stage."""

from pipelines.store.ledger import DETAILS

# Written last and not committed, since it holds timings: its existence says that training is finished.
DETAILS_FILE = DETAILS
HISTORY_FILE = "history.json"
TRAIN_FOLDER = "train"
# Their contents depend on how often something is logged.
LOGS = (HISTORY_FILE, "previews/")

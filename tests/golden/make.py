"""Make the golden files that are made from the code anew: ``python -m tests.golden.make``."""

import json
import tempfile
from pathlib import Path

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.db.engine import Database
from registry.storage.local import LocalStore
from tests.world import SETTINGS

OPENAPI = Path(__file__).with_name("openapi.json")


def openapi() -> str:
    """The routes of the API, described; the version of the distribution is left out."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{Path(folder) / 'empty.db'}")
        store = LocalStore(Path(folder) / "store", "http://localhost", b"key")
        described = create_app(AppParts(SETTINGS, database, store, Broker("memory://"))).openapi()
        database.close()
    described["info"].pop("version")
    return json.dumps(described, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    OPENAPI.write_text(openapi(), encoding="utf-8")

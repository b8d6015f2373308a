"""A daemon process on a FakeStore: `python serve_fake.py CONFIG [close_s]`."""

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fake_store import FakeStore

from kvtier import config
from kvtier.server import daemon


class SlowToClose(FakeStore):
    """Takes its time to stop."""

    async def close(self, *, grace_s: float) -> None:
        await asyncio.sleep(float(sys.argv[2]))
        await super().close(grace_s=grace_s)


async def open_store(_: config.Config) -> Any:
    return SlowToClose() if len(sys.argv) > 2 else FakeStore()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    sys.exit(daemon.run(config.load(path, {}), path, open_store=open_store))

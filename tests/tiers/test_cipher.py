"""Encrypted namespaces of an SSD tier: what lies on disk, what damage and other keys do, nonces."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.block import SLOT_BITS, SlotIO
from kvtier.errors import BlockCorrupt, ConfigError, TierFailed
from kvtier.testing.conformance import DESCRIPTOR, NAMESPACE, Blocks
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.cipher import DataKey, Keyring, MasterKey, read_key
from kvtier.tiers.slab import SLAB_RESERVED_BYTES
from kvtier.tiers.slots import unpack_slot_header
from kvtier.tiers.ssd import SsdTier
from kvtier.units import KIB, MIB, PAGE_BYTES

pytest.importorskip("cryptography")

SIZE = 8 * KIB
SLOT_BYTES = SIZE + PAGE_BYTES
KEY, OTHER = b"k" * 32, b"o" * 32
SEALED = SLAB_RESERVED_BYTES  # where the first slot of a slab lies
SALT, TAG = slice(216, 232), slice(232, 248)


class Life:
    """A tier with a keyring, from its start to its end."""

    def __init__(
        self,
        directory: Path,
        master: bytes | None = KEY,
        previous: bytes | None = None,
        *,
        wanted: bool = True,
        epoch: int = 0,
    ) -> None:
        self.directory = directory
        self.keyring = Keyring(master, previous, wanted=lambda _: wanted)
        self.tier = SsdTier(directory, 2, MIB, min_free_bytes=0, keyring=self.keyring)
        self.found = list(self.tier.recover())
        if not self.keyring.locked:
            self.tier.register_namespace(NAMESPACE, DESCRIPTOR, epoch)

    def write(
        self, count: int = 3, *, seed: int = 1, first_slot: int = 0, epoch: int = 0
    ) -> Blocks:
        blocks = Blocks(self.tier, count, SIZE, seed=seed, first_slot=first_slot)
        for item in blocks.items:
            item.label.epoch = epoch
        self.tier.write(blocks.items)
        assert [item.error for item in blocks.items] == [None] * count
        return blocks

    def errors(self, blocks: Blocks) -> list[type[Exception] | None]:
        """What each says; those without an error hold what was written."""
        blocks.scrub()
        self.tier.read(blocks.items)
        for item, held, content in zip(blocks.items, blocks.held(), blocks.contents, strict=True):
            if item.error is None or self.keyring.key_of(NAMESPACE):
                assert (held == content) is (item.error is None)
        return [type(item.error) if item.error else None for item in blocks.items]

    def read_found(self, blocks: Blocks) -> int:
        """As after a restart: with the labels that the catalogue has. How many were right."""
        contents = {i.label.key: c for i, c in zip(blocks.items, blocks.contents, strict=True)}
        good = 0
        for record in self.found:
            item = SlotIO(record.slot, record.slot_bytes, blocks.buffer.address, record.label)
            self.tier.read([item])
            if item.error is None:
                assert bytes(blocks.buffer.view[:SIZE]) == contents[record.label.key]
                good += 1
        return good

    def kill(self) -> None:
        self.tier._catalogue.abandon()
        for slab in self.tier._slabs:
            slab.close()

    def close(self) -> None:
        self.tier.close()


def slab(directory: Path, index: int = 0) -> Path:
    return directory / "slabs" / f"{index:05}.slab"


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def flip(path: Path, offset: int) -> None:
    patch(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def everything(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_nothing_of_a_block_lies_on_disk(tmp_path: Path) -> None:
    life = Life(tmp_path)
    blocks = life.write()
    assert life.errors(blocks) == [None] * 3
    life.close()
    on_disk = everything(tmp_path)
    for item, content in zip(blocks.items, blocks.contents, strict=True):
        assert not any(content[at : at + 16] in on_disk for at in range(0, SIZE, 512))
        assert item.label.checksum.to_bytes(8, "little") not in on_disk, "who has the same bytes"
    assert KEY not in on_disk
    life = Life(tmp_path)
    assert life.read_found(blocks) == 3
    life.close()


def test_equal_blocks_do_not_look_equal(tmp_path: Path) -> None:
    life = Life(tmp_path)
    one, two = life.write(1), life.write(1, first_slot=1)
    assert one.contents == two.contents
    life.close()
    content = slab(tmp_path).read_bytes()
    first, second = (content[SEALED + at :][:SLOT_BYTES] for at in (0, SLOT_BYTES))
    assert first[PAGE_BYTES:] != second[PAGE_BYTES:]
    assert first[64:72] != second[64:72]
    assert first[TAG] != second[TAG]


def fields() -> dict[str, int]:
    places = {"namespace": 16, "epoch": 32, "size": 56, "checksum": 64, "generation": 72, "key": 80}
    places |= {"stored at": 208, "cipher": 212, "salt": SALT.start, "tag": TAG.start}
    return places | {"sum": 248, "first byte": PAGE_BYTES, "last byte": PAGE_BYTES + SIZE - 1}


@pytest.mark.parametrize("field", fields())
@pytest.mark.parametrize("mended", [False, True], ids=["", "with a new checksum"])
def test_a_flipped_bit_is_a_miss(tmp_path: Path, field: str, mended: bool) -> None:
    from kvtier import native

    life = Life(tmp_path)
    blocks = life.write(2)
    flip(slab(tmp_path), SEALED + fields()[field])
    if mended:  # whoever can write to the disk can make the header's own checksum right
        head = slab(tmp_path).read_bytes()[SEALED : SEALED + 248]
        patch(slab(tmp_path), SEALED + 248, native.checksum_bytes(head).to_bytes(8, "little"))
        if field == "sum":
            pytest.skip("nothing is wrong then")
    assert life.errors(blocks) == [BlockCorrupt, None]
    assert life.tier.counts().corrupt_count == 1
    life.close()


def test_swapped_slots_and_older_writings_are_misses(tmp_path: Path) -> None:
    life = Life(tmp_path)
    blocks = life.write(2)
    content = slab(tmp_path).read_bytes()
    first, second = (content[SEALED + at :][:SLOT_BYTES] for at in (0, SLOT_BYTES))
    patch(slab(tmp_path), SEALED, second + first)
    assert life.errors(blocks) == [BlockCorrupt] * 2

    patch(slab(tmp_path), SEALED, first + second)
    again = life.write(2)  # the same keys, written once more: other bytes of the same block
    for item in again.items:
        blocks.buffer.view[:SIZE] = b"x" * SIZE
        item.address = blocks.buffer.address
        item.label.checksum = 0
    life.tier.write(again.items)
    newest = [item.label.checksum for item in again.items]
    patch(slab(tmp_path), SEALED, first + second)
    life.tier.read(again.items)
    assert [type(item.error) for item in again.items] == [BlockCorrupt] * 2
    assert [item.label.checksum for item in again.items] == newest
    life.close()
    life = Life(tmp_path)
    assert len(life.found) == 2
    assert life.read_found(blocks) == 0, "the catalogue knows which writing it must be"
    life.close()


def test_plaintext_in_an_encrypted_namespace_is_a_miss(tmp_path: Path) -> None:
    """Else whoever can write to the disk could make blocks."""
    plain = Life(tmp_path / "plain", None, wanted=False)
    blocks = plain.write(1)
    plain.close()
    sealed = Life(tmp_path / "sealed")
    sealed.write(1)
    planted = slab(tmp_path / "plain").read_bytes()[SEALED : SEALED + SLOT_BYTES]
    patch(slab(tmp_path / "sealed"), SEALED, planted)
    assert sealed.errors(blocks) == [BlockCorrupt]
    sealed.close()


@pytest.mark.parametrize("lost", ["nothing", "catalogue", "namespaces", "identity", "all"])
def test_it_comes_back_from_what_is_left(tmp_path: Path, lost: str) -> None:
    life = Life(tmp_path)
    blocks = life.write()
    life.kill()
    if lost in ("catalogue", "all"):
        shutil.rmtree(tmp_path / "catalogue")
    for name in ("namespaces", "identity"):
        if lost in (name, "all"):
            (tmp_path / name).unlink()
    life = Life(tmp_path)
    assert life.read_found(blocks) == 3
    more = life.write(1, seed=2, first_slot=3)
    assert life.errors(more) == [None]
    life.close()


@pytest.mark.parametrize("master", [OTHER, None], ids=["another key", "no key"])
@pytest.mark.parametrize("rebuild", [False, True])
def test_under_another_key_nothing_is_read_and_nothing_is_lost(
    tmp_path: Path, master: bytes | None, rebuild: bool, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(tmp_path)
    blocks = life.write()
    life.close()
    for _ in range(2):
        if rebuild:
            shutil.rmtree(tmp_path / "catalogue")
            (tmp_path / "namespaces").unlink(missing_ok=True)
        life = Life(tmp_path, master)
        assert life.keyring.locked == {NAMESPACE}
        assert NAMESPACE.hex() in caplog.text
        assert len(life.found) == 3
        assert life.errors(blocks) == [TierFailed] * 3, "no damage: nobody may drop it"
        assert life.tier.counts().corrupt_count == 0
        with pytest.raises(TierFailed):
            life.tier.naming.current(NAMESPACE)
        life.close()
    life = Life(tmp_path)
    assert life.read_found(blocks) == 3
    life.close()


def test_a_new_master_key(tmp_path: Path) -> None:
    life = Life(tmp_path)
    blocks = life.write()
    life.close()
    old = (tmp_path / "namespaces").read_bytes()
    life = Life(tmp_path, OTHER, previous=KEY)
    assert life.read_found(blocks) == 3
    life.kill()
    assert (tmp_path / "namespaces").read_bytes() != old
    for name in ("namespaces", "catalogue/data.mdb", "nothing"):  # slabs have it, too
        (tmp_path / name).unlink(missing_ok=True)
        life = Life(tmp_path, OTHER)
        assert life.read_found(blocks) == 3
        life.kill()
    assert Life(tmp_path, KEY).keyring.locked == {NAMESPACE}


def test_encryption_that_begins_later(tmp_path: Path) -> None:
    life = Life(tmp_path, None, wanted=False)
    before = life.write(2)
    life.close()
    life = Life(tmp_path)
    assert life.read_found(before) == 2
    after = life.write(2, seed=2, first_slot=2)
    assert life.errors(before) + life.errors(after) == [None] * 4
    life.close()
    on_disk = everything(tmp_path)
    assert before.contents[0][:64] in on_disk, "what was there before is as it was"
    assert after.contents[0][:64] not in on_disk


def test_without_a_key_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TierFailed, match="key_file"):
        Life(tmp_path, None, wanted=True)


# --- purge


def wrapped_keys(directory: Path) -> set[bytes]:
    life = Life(directory)
    keys = {named.key for named in life.tier.naming.names.values()}
    life.close()
    return keys - {b""}


def test_a_purge_destroys_the_key_everywhere(tmp_path: Path) -> None:
    life = Life(tmp_path)
    blocks = life.write(120)
    [named] = life.tier.naming.names.values()
    life.tier.set_epoch(NAMESPACE, 1)  # both copies of the slabs' lists have the key
    (tmp_path / "namespaces.damaged-20260101T000000Z").write_bytes(named.key.hex().encode())
    sealed = [path.read_bytes() for path in (slab(tmp_path), slab(tmp_path, 1))]
    assert life.tier.purge(NAMESPACE, 2) == (True, [])
    life.kill()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert named.key[20:36] not in path.read_bytes()
            assert named.key.hex()[40:72].encode() not in path.read_bytes()
    for path in (slab(tmp_path), slab(tmp_path, 1)):
        from kvtier.tiers.slab_head import unpack_names

        for at in (4 * KIB, 32 * KIB):
            area = path.read_bytes()[at : at + 28 * KIB]
            assert all(not one.key for one in unpack_names(area).names.values())
    assert slab(tmp_path).read_bytes()[SEALED:] == sealed[0][SEALED:], "ciphertext may stay"

    for lost in ("", "catalogue", "namespaces"):
        if lost:
            path = tmp_path / lost
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        life = Life(tmp_path, epoch=2)
        assert life.found == []
        life.kill()
    life = Life(tmp_path, epoch=2)
    [again] = life.tier.naming.names.values()
    assert again.key not in (b"", named.key)
    more = life.write(1, seed=3, epoch=2)
    assert life.errors(more) == [None]
    assert life.errors(blocks)[1:] == [BlockCorrupt] * 119
    life.close()


def test_a_purge_of_plaintext_names_what_must_be_scoured(tmp_path: Path) -> None:
    life = Life(tmp_path, None, wanted=False)
    blocks = life.write(3)
    life.tier.erase(blocks.records(), durable=True)
    life.tier.recycle(0)  # the slab lists nobody now, and still has the bytes
    assert life.tier.naming.names[NAMESPACE].plain
    life.close()
    assert blocks.contents[0][:64] in everything(tmp_path)
    life = Life(tmp_path, None, wanted=False)
    assert life.tier.purge(NAMESPACE, 1) == (False, [0])
    assert life.tier.scour(0, None) == MIB
    life.tier.naming.scoured(NAMESPACE)
    for content in blocks.contents:
        assert content[-64:] not in everything(tmp_path)
    assert life.tier.purge(NAMESPACE, 2) == (False, [])
    life.close()


def test_scouring_spares_what_is_in_use(tmp_path: Path) -> None:
    life = Life(tmp_path, None, wanted=False)
    blocks = life.write(4)
    tail = SLAB_RESERVED_BYTES + MIB - 4 * KIB
    patch(slab(tmp_path), tail, b"left by someone")
    gone = blocks.records()[1:3]
    life.tier.erase(gone, durable=True)
    life.tier.scour(0, [record.slot for record in gone])
    content = slab(tmp_path).read_bytes()
    assert not content[SEALED + SLOT_BYTES : SEALED + 3 * SLOT_BYTES].strip(b"\0")
    assert b"left by someone" not in content
    assert life.errors(blocks) == [None, BlockCorrupt, BlockCorrupt, None]
    life.close()


def test_a_whole_erasure_leaves_no_byte(tmp_path: Path) -> None:
    life = Life(tmp_path, None, wanted=False)
    blocks = life.write(3)
    life.tier.erase(blocks.records()[:1], durable=True, whole=True)
    life.tier.erase(blocks.records()[1:2], durable=True)
    on_disk = everything(tmp_path)
    assert [content[-64:] in on_disk for content in blocks.contents] == [False, True, True]
    assert life.errors(blocks) == [BlockCorrupt, BlockCorrupt, None]
    life.close()


# --- nonces


def nonces(directory: Path) -> dict[tuple[bytes, int], bytes]:
    """(salt, generation) of every encrypted slot on disk -> its ciphertext."""
    found = {}
    for path in (directory / "slabs").glob("*.slab"):
        content = path.read_bytes()
        for at in range(SEALED, len(content) - SLOT_BYTES + 1, SLOT_BYTES):
            head = memoryview(content)[at : at + PAGE_BYTES]
            try:
                record = unpack_slot_header(head, 0)
            except BlockCorrupt:
                continue
            generation = record.label.generation
            found[bytes(head[SALT]), generation] = content[at + PAGE_BYTES :][:SIZE]
    return found


def lose(*names: str) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        for name in names:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    return run


def test_a_nonce_never_meets_a_key_twice(tmp_path: Path) -> None:
    """Over clean ends, kills, rebuilds, loss of what counts the starts, and going back in time."""
    directory, backup = tmp_path / "ssd", tmp_path / "backup"
    seen: dict[tuple[bytes, int], bytes] = {}
    generations: set[int] = set()

    def live(*, end: Callable[[Life], None], wipe: bool) -> None:
        life = Life(directory)
        blocks = life.write(8, seed=next(seeds))
        for name, ciphertext in nonces(directory).items():
            assert seen.setdefault(name, ciphertext) == ciphertext, "one nonce, two messages"
        new = {item.label.generation for item in blocks.items}
        if not rolled_back:
            assert not new & generations
        generations.update(new)
        if wipe:  # the newest generations are in no header any longer
            life.tier.erase(blocks.records(), durable=True)
        end(life)

    seeds, rolled_back = itertools.count(), False
    disasters = [
        lose(), lose("catalogue"), lose("identity"), lose("namespaces"),
        lose("catalogue", "identity", "namespaces"),
    ]  # fmt: skip
    for disaster in disasters:
        for end, wipe in itertools.product((Life.close, Life.kill), (False, True)):
            live(end=end, wipe=wipe and disaster is disasters[0])
            disaster(directory)
    shutil.copytree(directory, backup)
    rolled_back = True
    for _ in range(3):
        live(end=Life.kill, wipe=False)
        shutil.rmtree(directory)
        shutil.copytree(backup, directory)
    assert len({salt for salt, _ in seen}) >= 23


def test_the_loss_of_the_starts_and_of_the_newest_headers(tmp_path: Path) -> None:
    """A start may then have the number of one before; its salt is another all the same."""
    life = Life(tmp_path)
    blocks = life.write(2)
    [one, _] = nonces(tmp_path)
    life.tier.erase(blocks.records(), durable=True)
    life.kill()
    lose("catalogue", "identity")(tmp_path)
    life = Life(tmp_path)
    life.write(2)
    assert one not in nonces(tmp_path)
    life.close()


# --- keys


def test_data_keys_are_of_their_namespace() -> None:
    master = MasterKey(KEY)
    wrapped = master.wrap(NAMESPACE, b"d" * 32)
    assert master.unwrap(NAMESPACE, wrapped) == b"d" * 32
    assert master.unwrap(bytes(16), wrapped) is None
    assert MasterKey(OTHER).unwrap(NAMESPACE, wrapped) is None
    for at in range(len(wrapped)):
        damaged = bytearray(wrapped)
        damaged[at] ^= 1
        assert master.unwrap(NAMESPACE, bytes(damaged)) is None


def test_large_blocks_go_through_in_pieces() -> None:
    """As the library does in one go."""
    import ctypes

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from kvtier.tiers.cipher import _derived

    size = MIB + 12345
    plain = bytes(range(256)) * (size // 256 + 1)
    source = ctypes.create_string_buffer(plain[:size], size)
    target = ctypes.create_string_buffer(size)
    back = ctypes.create_string_buffer(size)
    addresses = [ctypes.addressof(part) for part in (source, target, back)]
    key, salt = DataKey(b"d" * 32), b"s" * 16
    tag = key.seal(salt, 7, b"aad", addresses[0], addresses[1], size)
    whole = AESGCM(_derived(b"d" * 32, salt, b"kvtier slots"))
    assert target.raw + tag == whole.encrypt((7).to_bytes(12, "little"), plain[:size], b"aad")
    key.open(salt, 7, b"aad", tag, addresses[1], addresses[2], size)
    assert back.raw == plain[:size]
    with pytest.raises(BlockCorrupt):
        key.open(salt, 7, b"other", tag, addresses[1], addresses[2], size)
    assert not back.raw.strip(b"\0"), "unverified plaintext stays nowhere"


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (KEY, 0o640, "mode 0640: others may read"),
        (KEY, 0o604, "chmod 600"),
        (KEY[:31], 0o600, "neither 32 bytes nor 64 hexadecimal"),
        (b"z" * 64, 0o600, "neither"),
        (b"", 0o600, "neither"),
    ],
)
def test_bad_key_files(tmp_path: Path, content: bytes, mode: int, message: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        read_key(path)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    for content in (KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"):
        path.write_bytes(content)
        assert read_key(path) == KEY
    path.chmod(0o440)
    assert read_key(path, is_guarded=True) == KEY
    with pytest.raises(ConfigError, match="No such file"):
        read_key(tmp_path / "none")


def test_slots_are_no_larger_for_being_encrypted(tmp_path: Path) -> None:
    life = Life(tmp_path)
    blocks = life.write(2)
    records = [SlotRecord(i.slot, i.slot_bytes, i.label) for i in blocks.items]
    assert {record.slot_bytes for record in records} == {PAGE_BYTES + SIZE}
    assert [record.slot >> SLOT_BITS for record in records] == [0, 0]
    life.close()

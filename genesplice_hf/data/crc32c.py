"""CRC-32C (Castagnoli), the checksum of TFRecord files, fast without a compiled package.

A CRC is linear over GF(2), so stretches of the data are worked through side by side in numpy and then joined:
the register after A and B is that of A moved on by |B| zero bytes, XOR that of B (as zlib's `crc32_combine`).
Polynomial 0x1EDC6F41, reflected (RFC 3720, appendix B.4); the masked form is that of the TFRecord format.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78
_LANE_BYTES = 256
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes | memoryview) -> int:
    """The CRC-32C of `data`."""
    octets = np.frombuffer(data, dtype=np.uint8)
    if len(octets) < _LANE_BYTES:
        return _bytewise(octets.tobytes())
    lanes = -(-len(octets) // _LANE_BYTES)
    # Zeros in front change nothing once the register starts from 0, and that is the same as inverting 4 bytes.
    padded = np.zeros(lanes * _LANE_BYTES, dtype=np.uint8)
    padded[-len(octets) :] = octets
    padded[len(padded) - len(octets) :][:4] ^= 0xFF
    return _joined(_advance(padded.reshape(lanes, _LANE_BYTES))) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The form that stands in TFRecord files: the CRC rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


@functools.cache
def _table() -> np.ndarray:
    """What each byte value does to an empty register, uint32 (256,)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@functools.cache
def _table_list() -> list[int]:
    return _table().tolist()


def _bytewise(data: bytes) -> int:
    table, register = _table_list(), 0xFFFFFFFF
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


def _advance(lanes: np.ndarray, registers: np.ndarray | None = None) -> np.ndarray:
    """Registers (lanes,) after the bytes (lanes, width), one column after the other."""
    table = _table()
    state = np.zeros(len(lanes), dtype=np.uint32) if registers is None else registers
    for column in np.ascontiguousarray(lanes.T):
        state = table[(state ^ column) & 0xFF] ^ state >> 8
    return state


def _joined(registers: np.ndarray) -> int:
    """The register after all stretches, from those after each alone, pairwise."""
    level = 0
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, dtype=np.uint32), registers])
        registers = _moved(registers[::2], _shift_tables(level)) ^ registers[1::2]
        level += 1
    return int(registers[0])


def _moved(registers: np.ndarray, tables: np.ndarray) -> np.ndarray:
    parts = [tables[place][registers >> 8 * place & 0xFF] for place in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


@functools.cache
def _shift_tables(level: int) -> np.ndarray:
    """What `_LANE_BYTES * 2**level` zero bytes do to each byte of a register, uint32 (4, 256)."""
    bits = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
    if level == 0:
        images = _advance(np.zeros((32, _LANE_BYTES), dtype=np.uint8), bits)
    else:
        half = _shift_tables(level - 1)
        images = _moved(_moved(bits, half), half)
    values = np.arange(256)
    tables = np.zeros((4, 256), dtype=np.uint32)
    for bit, image in enumerate(images):
        tables[bit // 8] ^= np.where(values >> bit % 8 & 1, image, np.uint32(0))
    return tables

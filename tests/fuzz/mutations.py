"""Odd values, and contents with some of them in place of what was there. ``rng`` is a random.Random throughout."""

import torch

ATTACKS = [  # texts
    "", "0", "x" * 10_000, "\x1b[31mred\n=1+1", "../../etc/passwd", "http://127.0.0.1:9/x", "timm", "resnet18",
    "\udcff", "hf-hub:some/body", "local-dir:/etc", "{pretrained: true}", "{checkpoint_path: /etc/passwd}",
    "{stem_width: 3}", "{pretrained: true, cache_dir: ., pretrained_cfg: {url: 'http://127.0.0.1:9/x'}}",
    "{layers: [9, 9, 9, 9]}",
    "[" * 600, "{act_layer: ../x}", "{a: &a [*a]}", "9" * 5000, "!!python/object/apply:os.system [ls]",
    "nan", "1e999",
]


def nested(value, levels: int, copies: int = 1):
    """The value in that many lists, each of which holds the next so many times."""
    for _ in range(levels):
        value = [value] * copies
    return value


def itself() -> dict:
    value = {}
    value["self"] = value
    return value


def odd_value(rng, old):
    """Anything, or something made of what was there."""
    plain = [
        None, True, -1, 0, 1, 3, 64, 10**9, 2**63, 2**70, -1.5, float("nan"), float("inf"), 1j, b"x", (), [], {}, set(),
        torch.float32, torch.device("cuda"), rng.choice(ATTACKS), rng.randrange(100), rng.random(),
        [old], (old,), {"a": old}, {0: old}, nested(old, 40), nested(1, 40, copies=2), nested(1, 9, copies=3), itself(),
    ]
    tensors = [
        torch.zeros(0), torch.zeros(1), torch.tensor(float("nan")), torch.ones(3, dtype=torch.int8),
        torch.zeros(1).expand(10**9), torch.zeros(2, 2, dtype=torch.complex64), torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.nn.Parameter(torch.zeros(2)),
    ]
    # An odd value, of 10**9 numbers, sparse or quantised, may have been put there before.
    if isinstance(old, torch.Tensor) and old.numel() < 10**6 and old.layout is torch.strided and not old.is_quantized:
        tensors += [
            old.double(), old.half(), old.bool(), old.to(torch.float8_e5m2), old[None], old.flatten(),
            old.flatten()[:-1], old * float("nan"), old - 1, old.flatten().flip(0).view(old.shape),
            old.transpose(0, -1) if old.ndim else old,
            old.flatten()[:1].expand(old.numel()).view(old.shape), torch.zeros_like(old), torch.full_like(old, 2),
        ]
        return rng.choice(tensors if rng.random() < 0.8 else plain)
    return rng.choice(plain if rng.random() < 0.8 else tensors)


def mutated(content: dict, rng) -> dict:
    """A copy with up to three entries dropped, retyped, renamed, doubled or exchanged, at any depth."""
    content = copied(content)
    for _ in range(rng.randrange(1, 4)):
        mutate(content, rng)
    return content


def mutate(content: dict, rng) -> None:
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        inside = place[key]
        if not isinstance(inside, (dict, list)) or not inside or rng.random() < 0.2:
            break
        place = inside
    action = rng.choice(["replace", "replace", "replace", "drop", "rename", "double", "exchange"])
    if action == "replace" or isinstance(place, list):
        place[key] = odd_value(rng, place[key])
    elif action == "drop":
        del place[key]
    elif action == "rename":
        place[rng.choice([f"{key}x", "", 0, (1, 2), "a\nb", "module." + str(key)])] = place.pop(key)
    elif action == "double":
        place[f"{key}.more"] = place[key]
    else:
        other = rng.choice(keys)
        place[key], place[other] = place[other], place[key]


def is_small(value) -> bool:
    """Whether its text has less than 10,000 values; one that holds the same list over and over may be endless."""
    found = [value]
    for _ in range(10_000):
        if not found:
            return True
        inner = found.pop()
        found += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, (list, tuple)) else ()
    return False


def copied(value):
    """The same containers anew; the tensors are shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def mutated_bytes(data: bytes, rng, snippets: list[bytes]) -> bytes:
    """The bytes with some flipped, removed, repeated, or one of the snippets put in."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at:at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at:at + rng.randrange(1, 40)]
            case 2:
                data[at:at] = data[at:at + rng.randrange(1, 80)]
            case 3:
                data[at:at] = rng.choice(snippets)
    return bytes(data)

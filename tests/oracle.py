"""The methods written with loops, from the papers: slow, and the judges."""

import math

import torch


def snapkv_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    window: int,
    kernel_size: int,
    pooling: str,
    scale: float,
) -> list[list[float]]:
    """Pooled scores of the tokens before the window, per KV head.

    Args:
        queries: ``[tokens, query_heads, head_size]``; the last ``window`` vote.
        keys: ``[kv_heads, tokens, head_size]``.
    """
    tokens, heads, _ = queries.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    past = tokens - window
    pooled = []
    for kv in range(kv_heads):
        votes = [0.0] * past
        for head in range(kv * group, (kv + 1) * group):
            for row in range(past, tokens):
                seen = keys[kv, : row + 1].double() @ queries[row, head].double()
                weights = (seen * scale).softmax(0)
                for token in range(past):
                    votes[token] += float(weights[token]) / group
        half = kernel_size // 2
        smooth = []
        for token in range(past):
            near = [
                votes[i] if 0 <= i < past else None
                for i in range(token - half, token + half + 1)
            ]
            if pooling == "max":
                smooth.append(max(v for v in near if v is not None))
            else:
                smooth.append(math.fsum(v or 0.0 for v in near) / kernel_size)
        pooled.append(smooth)
    return pooled


def snapkv_kept(
    scores: list[list[float]], *, num_tokens: int, budget: int, block_size: int
) -> list[set[int]]:
    """Tokens of a prompt that stay readable, per KV head.

    The tail behind the last whole block and the window stay; of the rest the
    best ones, lowest index first among equals, until the whole blocks that the
    budget has room for are full.
    """
    window = num_tokens - len(scores[0])
    end = num_tokens // block_size * block_size
    tail = num_tokens - end
    room = (budget - tail) // block_size * block_size
    if room >= end:
        return [set(range(num_tokens)) for _ in scores]
    kept = []
    for head in scores:
        forced = set(range(num_tokens - window, end))
        others = sorted(
            range(min(end, num_tokens - window)), key=lambda i: (-head[i], i)
        )
        chosen = others[: room - len(forced)]
        kept.append(forced | set(chosen) | set(range(end, num_tokens)))
    return kept


def _cosine(one: list[float], other: list[float]) -> float:
    length = math.hypot(*one) * math.hypot(*other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / length


def _softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def keydiff_scores(keys: torch.Tensor) -> list[list[float]]:
    """Minus the cosine with the mean of the keys' directions, per KV head."""
    scores = []
    for head in keys.double().tolist():
        anchor = [
            math.fsum(key[i] / math.hypot(*key) for key in head) / len(head)
            for i in range(len(head[0]))
        ]
        scores.append([-_cosine(key, anchor) for key in head])
    return scores


def knorm_scores(keys: torch.Tensor) -> list[list[float]]:
    """Minus the length, per KV head."""
    return [[-math.hypot(*key) for key in head] for head in keys.double().tolist()]


def tova_scores(
    query: torch.Tensor, keys: torch.Tensor, *, scale: float
) -> list[float]:
    """The last query's attention, mean over all heads ``[query_heads, head_size]``."""
    kv_heads, tokens, _ = keys.shape
    group = len(query) // kv_heads
    mean = [0.0] * tokens
    for head, vector in enumerate(query.double()):
        logits = keys[head // group].double() @ vector * scale
        for token, weight in enumerate(_softmax(logits.tolist())):
            mean[token] += weight / len(query)
    return mean


def rkv_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    kernel_size: int,
    threshold: float,
    recent: int,
    mix_lambda: float,
    scale: float,
) -> list[list[float]]:
    """Scores of the tokens before the window, per KV head.

    Args:
        queries: ``[window, query_heads, head_size]``.
        keys: ``[kv_heads, tokens, head_size]``.
    """
    window, heads, _ = queries.shape
    kv_heads, tokens, _ = keys.shape
    group, past = heads // kv_heads, tokens - window
    scores = []
    for kv, head in enumerate(keys.double().tolist()):
        importance = [0.0] * past
        for row in queries.double():
            logits = [
                max(
                    float(row[query] @ keys[kv, token].double()) * scale
                    for query in range(kv * group, (kv + 1) * group)
                )
                for token in range(past)
            ]
            for token, weight in enumerate(_softmax(logits)):
                importance[token] += weight / window
        half = kernel_size // 2
        pooled = [max(importance[max(0, i - half) : i + half + 1]) for i in range(past)]
        sums = [0.0] * tokens
        for row in range(tokens):
            others = [token for token in range(tokens) if token != row]
            cosines = {token: _cosine(head[row], head[token]) for token in others}
            similar = [token for token in others if cosines[token] > threshold]
            latest = similar[len(similar) - min(recent, len(similar)) :]
            for token in others:
                if token not in latest:
                    sums[token] += cosines[token]
        redundancy = _softmax([total / tokens for total in sums])
        scores.append(
            [
                mix_lambda * pooled[token] - (1 - mix_lambda) * redundancy[token]
                for token in range(past)
            ]
        )
    return scores


def pyramidkv_budgets(
    num_tokens: int, budget: int, num_layers: int, *, window: int, beta: int
) -> list[int]:
    """KVCache-Factory's, with its integers; at least two layers and ``budget`` tokens.

    Its mean exceeds the budget where the step's fraction is cut off.
    """
    mean = budget - window
    if num_tokens < 2 * mean:
        return [budget] * num_layers
    low = mean // beta
    high = 2 * mean - low
    if high >= num_tokens - window:
        high = num_tokens - window
        low = 2 * mean - high
    step = (high - low) // (num_layers - 1)
    return [high - layer * step + window for layer in range(num_layers)]


def slerp(
    shallow: list[float], deep: list[float], t: float
) -> tuple[list[float], list[float], float]:
    """Both vectors as restored from one direction, and their angle as a share of pi.

    For vectors that are neither zero nor parallel.
    """
    lengths = [math.hypot(*vector) for vector in (shallow, deep)]
    u = [x / lengths[0] for x in shallow]
    v = [x / lengths[1] for x in deep]
    dot = math.fsum(a * b for a, b in zip(u, v, strict=True))
    angle = math.acos(max(-1.0, min(1.0, dot)))
    low, high = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    unit = [low * a + high * b for a, b in zip(u, v, strict=True)]
    first, second = ([length * x for x in unit] for length in lengths)
    return first, second, angle / math.pi


def minicache(
    shallow: tuple[torch.Tensor, torch.Tensor],
    deep: tuple[torch.Tensor, torch.Tensor],
    *,
    t: float,
    retained: int,
    gamma: float | None = None,
) -> tuple[list[list[torch.Tensor]], set[int]]:
    """Merge the keys and values of one KV head in two layers.

    Args:
        shallow: Keys and values, ``[tokens, head_size]`` each.
        deep: The same.
        t: Weight of the deep one's direction.
        retained: Tokens that stay as they are.
        gamma: Of these only those within this share of the range; None = all.

    Returns:
        Keys and values as the shallow layer reads them, and as the deep one does; and
        which tokens stayed.
    """
    restored = [[torch.empty_like(x) for x in layer] for layer in (shallow, deep)]
    share = [0.0] * len(shallow[0])
    for half in (0, 1):
        distances = []
        for i, (a, c) in enumerate(zip(shallow[half], deep[half], strict=True)):
            first, second, distance = slerp(a.tolist(), c.tolist(), t)
            restored[0][half][i] = torch.tensor(first)
            restored[1][half][i] = torch.tensor(second)
            distances.append(distance)
        low, span = min(distances), max(distances) - min(distances)
        share = [
            max(s, (d - low) / span) for s, d in zip(share, distances, strict=True)
        ]
    order = sorted(range(len(share)), key=lambda i: (-share[i], i))
    stayed = {i for i in order[:retained] if gamma is None or share[i] >= 1 - gamma}
    for own, layer in zip(restored, (shallow, deep), strict=True):
        for half in (0, 1):
            for i in stayed:
                own[half][i] = layer[half][i]
    return restored, stayed

"""Each operator once more as a literal loop over pixels in numpy float64: the specification of the
specification."""

import math

import numpy as np


def bilinear(maps, size, align_corners=False):
    """[..., h, w] to [..., H, W], one label pixel at a time."""
    h, w = maps.shape[-2:]
    out = np.zeros((*maps.shape[:-2], *size))
    for y in range(size[0]):
        for x in range(size[1]):
            out[..., y, x] = sum(
                a * b * maps[..., i, j]
                for i, a in _taps(y, h, size[0], align_corners)
                for j, b in _taps(x, w, size[1], align_corners)
            )
    return out


def _taps(x, n, size, align_corners):
    if align_corners:
        source = x * (n - 1) / (size - 1) if size > 1 else 0.0
    else:
        source = max((x + 0.5) * n / size - 0.5, 0.0)
    low = min(int(source), n - 1)
    share = source - low
    return [(low, 1 - share), (min(low + 1, n - 1), share)]


def bilinear_stepwise(maps, size):
    """The same along y, then along x, in the maps' own precision: each product and each sum rounds once."""
    for axis, n in ((1, size[0]), (2, size[1])):
        lines = []
        for x in range(n):
            (low, _), (high, share) = _taps(x, maps.shape[axis], n, False)
            share = maps.dtype.type(share if high > low else 0.0)
            left, right = maps.take(low, axis), maps.take(high, axis)
            lines.append((maps.dtype.type(1) - share) * left + share * right)
        maps = np.stack(lines, axis)
    return maps


def unit(v):
    norm = math.sqrt(float(v @ v))
    return v / norm if norm > 1e-12 else v * 0


def pool(features, regions, c, weights=None, normalize=True, align_corners=False):
    b, d = features.shape[:2]
    size = regions.shape[-2:]
    up = bilinear(features, size, align_corners)
    sums, mass = np.zeros((b, c, d)), np.zeros((b, c))
    for n, y, x in np.ndindex(b, *size):
        weight = 1.0 if weights is None else weights[n, y, x]
        f = unit(up[n, :, y, x]) if normalize else up[n, :, y, x]
        for k in range(c):
            share = regions[n, k, y, x] if regions.ndim == 4 else float(regions[n, y, x] == k)
            sums[n, k] += weight * share * f
            mass[n, k] += weight * share
    return sums, mass


def contrast(features, prototypes, regions, tau, valid=None, weights=None, align_corners=False):
    """(weighted loss of each pixel, weight of each pixel)"""
    b = features.shape[0]
    up = bilinear(features, regions.shape[-2:], align_corners)
    loss, total = np.zeros(regions.shape), np.zeros(regions.shape)
    for n, y, x in np.ndindex(*regions.shape):
        table = prototypes[n] if prototypes.ndim == 3 else prototypes
        allowed = np.ones(len(table), bool) if valid is None else np.broadcast_to(valid, (b, len(table)))[n]
        label = regions[n, y, x]
        if label == 255 or not allowed[label]:
            continue
        f = unit(up[n, :, y, x])
        z = {c: float(f @ unit(p)) / tau for c, p in enumerate(table) if allowed[c]}
        weight = 1.0 if weights is None else weights[n, y, x]
        loss[n, y, x] = weight * -math.log(math.exp(z[label]) / sum(math.exp(v) for v in z.values()))
        total[n, y, x] = weight
    return loss, total


def compare(main, support, labels, size, attention):
    """The loss of each image and class [B,K], and the attention [S,T,B,K] that it held constant
    (``attention``: the one to use, "none" or "cosine")."""
    b, k = labels.shape
    relu = lambda maps: np.maximum(bilinear(maps, size), 0)  # noqa: E731
    ms, ss = [relu(m) for m in main], [relu(s) for s in support]
    loss, held = np.zeros((b, k)), np.ones((len(ms), len(ss), b, k))
    for n, c in np.ndindex(b, k):
        if not labels[n, c]:
            continue
        for i, m in enumerate(ms):
            target = np.zeros(size)
            for j, s in enumerate(ss):
                if isinstance(attention, np.ndarray):
                    held[i, j, n, c] = attention[i, j, n, c]
                elif attention == "cosine":
                    a, v = m[n, c].ravel(), s[n, c].ravel()
                    norms = math.sqrt(float(a @ a)) * math.sqrt(float(v @ v))
                    held[i, j, n, c] = 2 - (float(a @ v) / norms if norms else 0.0)
                target += held[i, j, n, c] * s[n, c] / len(ss)
            loss[n, c] += np.abs(m[n, c] - target).sum()
    return loss, held


def region_mask(cams, labels, size, foreground, background, ignore):
    b, k = labels.shape
    total = sum(np.maximum(bilinear(c, size), 0) for c in cams)
    mask = np.zeros((b, *size), np.uint8)
    for n, y, x in np.ndindex(*mask.shape):
        score, best = -1.0, None
        for c in range(k):
            if labels[n, c]:
                a = total[n, c, y, x] / (total[n, c].max() + 1e-5)
                if a > score:
                    score, best = a, c
        mask[n, y, x] = best + 1 if score >= foreground else 0 if score < background else ignore
    return mask


def sweep(cams, ids, truths, c, thresholds=None, power=None, normalize=False):
    """The evaluation loop as peers write it: for each background score the prediction, for each pixel a
    count."""
    scores = [("threshold", t) for t in thresholds] if power is None else [("power", a) for a in power]
    counts = np.zeros((len(scores), c, c), np.int64)
    for cam, numbers, truth in zip(cams, ids, truths, strict=True):
        up = bilinear_stepwise(cam, truth.shape) if cam.shape[1:] != truth.shape else cam
        if normalize:
            up = up / (up.max((1, 2), keepdims=True) + 1e-5)
        for t, (kind, score) in enumerate(scores):
            for y, x in np.ndindex(*truth.shape):
                if truth[y, x] == 255:
                    continue
                prediction = 0
                if len(numbers):
                    best = max(up[:, y, x])
                    background = cam.dtype.type(score) if kind == "threshold" else (1 - best) ** score
                    if best > background:
                        prediction = min(n for n, v in zip(numbers, up[:, y, x], strict=True) if v == best)
                counts[t, truth[y, x], prediction] += 1
    return counts


def edge_affinity(edge, radius, beta):
    """IRN's dense matrix [h·w,h·w]: one pair of cells at a time."""
    h, w = edge.shape
    matrix = np.eye(h * w)
    for i, j in _pairs(h, w, radius):
        (y0, x0), (y1, x1) = divmod(i, w), divmod(j, w)
        length = (y1 - y0) ** 2 + (x1 - x0) ** 2
        largest = 0.0
        for y in range(min(y0, y1), max(y0, y1) + 1):
            for x in range(min(x0, x1), max(x0, x1) + 1):
                if ((y1 - y0) * (x - x0) - (x1 - x0) * (y - y0)) ** 2 / length < 1:
                    largest = max(largest, edge[y, x])
        matrix[i, j] = (1 - largest) ** beta
    return matrix


def feature_affinity(features, radius, beta):
    """AffinityNet's dense matrix."""
    d, h, w = features.shape
    if min(h, w) < 2 * radius + 1:
        radius = (min(h, w) - 1) // 2
    flat, matrix = features.reshape(d, h * w), np.eye(h * w)
    for i, j in _pairs(h, w, radius):
        matrix[i, j] = np.exp(-np.abs(flat[:, i] - flat[:, j]).mean()) ** beta
    return matrix


def _pairs(h, w, radius):
    for i in range(h * w):
        for j in range(h * w):
            (y0, x0), (y1, x1) = divmod(i, w), divmod(j, w)
            if i != j and (y1 - y0) ** 2 + (x1 - x0) ** 2 < radius**2:
                yield i, j


def dense_walk(cams, affinity, log2_steps):
    """[k,h,w] by the transition matrix squared log2_steps times."""
    transition = affinity / affinity.sum(0, keepdims=True)
    for _ in range(log2_steps):
        transition = transition @ transition
    return (cams.reshape(len(cams), -1) @ transition).reshape(cams.shape)


def crf(images, probabilities, iterations, gaussian, bilateral):
    """Mean field with one pair of pixels at a time."""
    b, c, h, w = probabilities.shape
    out = np.zeros((b, c, h, w))
    pixels = list(np.ndindex(h, w))
    for n, image in enumerate(images.astype(float)):

        def near(i, j):
            return math.exp(-((i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2) / (2 * gaussian[0] ** 2))

        def alike(i, j, image=image):
            colours = sum((image[k][i] - image[k][j]) ** 2 for k in range(3))
            apart = (i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2
            return math.exp(-apart / (2 * bilateral[0] ** 2) - colours / (2 * bilateral[1] ** 2))

        unary = {i: -np.log(probabilities[n, :, i[0], i[1]].clip(1e-5, 1)) for i in pixels}
        q = {i: softmax(-unary[i]) for i in pixels}
        for _ in range(iterations):
            logits = {i: -unary[i] for i in pixels}
            for kernel, weight in ((near, gaussian[-1]), (alike, bilateral[-1])):
                total = {i: sum(kernel(i, j) for j in pixels) for i in pixels}
                for i in pixels:
                    for j in pixels:
                        logits[i] = logits[i] + weight * kernel(i, j) / math.sqrt(total[i] * total[j]) * q[j]
            q = {i: softmax(logits[i]) for i in pixels}
        for i in pixels:
            out[n, :, i[0], i[1]] = q[i]
    return out


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()

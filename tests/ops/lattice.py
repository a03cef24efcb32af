"""dense_crf on the permutohedral lattice once more, in numpy float64 from the lattice's definition: what the kernels
compute to the last digits."""

import numpy as np


class Lattice:
    """The normalised kernel D^-½ K D^-½ on the simplices of the points ``features`` [N,d]."""

    def __init__(self, features):
        n, d = features.shape
        # orthogonal directions of the plane Σ e_i = 0, long enough for a blur of standard deviation 1
        basis = np.zeros((d, d + 1))
        for k in range(d):
            basis[k, : k + 1], basis[k, k + 1] = 1, -(k + 1)
            basis[k] *= (d + 1) * np.sqrt(2 / 3) / np.linalg.norm(basis[k])
        points = (features + 1e-6) @ basis  # off the borders of simplices, as kOffBorders in csrc/dense_crf.h
        corners = _corners(points)  # [N,d+1,d+1]: the vertices of each point's simplex
        # weights that add up to 1 and to the point; the last coordinate follows from the others
        equations = np.concatenate([corners[..., :d].swapaxes(1, 2), np.ones((n, 1, d + 1))], 1)
        right = np.concatenate([points[:, :d], np.ones((n, 1))], 1)
        self.weights = np.linalg.solve(equations, right[..., None])[..., 0]
        assert self.weights.min(initial=0) > -1e-9, "a point outside of its simplex"
        vertices, index = np.unique(corners.reshape(-1, d + 1), axis=0, return_inverse=True)
        self.corners = index.reshape(n, d + 1)
        numbers = {tuple(v): i for i, v in enumerate(vertices.tolist())}
        # for each direction of the blur the two neighbours, or a row of zeros behind the last vertex
        self.neighbours = []
        for j in range(d + 1):
            step = np.ones(d + 1, np.int64)
            step[j] -= d + 1
            self.neighbours += [
                [
                    [numbers.get(tuple(v), len(vertices)) for v in (vertices + s).tolist()]
                    for s in (step, -step)
                ]
            ]
        self.scale = np.ones((n, 1))
        self.scale = 1 / np.sqrt(self(np.ones((n, 1))))

    def __call__(self, values):  # [N,C] -> [N,C]
        lattice = np.zeros((self.corners.max() + 2, values.shape[1]))
        spread = self.weights[..., None] * (self.scale * values)[:, None]
        np.add.at(lattice, self.corners, spread)
        for right, left in self.neighbours:
            lattice[:-1] += 0.5 * (lattice[right] + lattice[left])
        return self.scale * (self.weights[..., None] * lattice[self.corners]).sum(1)


def _corners(points):
    """The nearest vertex of remainder 0, then one step along a coordinate after the other, largest difference first."""
    d = points.shape[1] - 1
    base = np.rint(points / (d + 1)).astype(np.int64)
    order = np.argsort(
        base * (d + 1) - points, axis=1, kind="stable"
    )  # coordinates, the largest difference first
    for row, first, excess in zip(base, order, base.sum(1), strict=True):
        for i in first[len(first) - excess :] if excess > 0 else first[:-excess]:
            row[i] -= np.sign(excess)
    base *= d + 1
    order = np.argsort(base - points, axis=1, kind="stable")
    found = [base]
    for k in range(d):
        # a vertex of remainder k+1 is 1 further in all coordinates, and d+1 back in the one with the k-th smallest
        step = np.ones_like(base)
        np.put_along_axis(step, order[:, d - k : d - k + 1], -d, 1)
        found.append(found[-1] + step)
    return np.stack(found, 1)


def mean_field(images, probabilities, iterations=10, gaussian=(3, 3), bilateral=(80, 13, 10)):
    """[B,3,H,W], [B,C,H,W] -> [B,C,H,W]"""
    b, c, h, w = probabilities.shape
    y, x = np.divmod(np.arange(h * w), w)
    out = np.zeros(probabilities.shape)
    for n in range(b if h * w else 0):
        colours = images[n].reshape(3, -1).astype(float)
        position = np.stack([x, y], 1)
        near = Lattice(position / gaussian[0])
        alike = Lattice(np.concatenate([position / bilateral[0], colours.T / bilateral[1]], 1))
        own = np.log(probabilities[n].reshape(c, -1).T.clip(1e-5, 1))
        q = _softmax(own)
        for _ in range(iterations):
            q = _softmax(own + gaussian[1] * near(q) + bilateral[2] * alike(q))
        out[n] = q.T.reshape(c, h, w)
    return out


def _softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)

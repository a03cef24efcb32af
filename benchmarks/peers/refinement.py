"""random_walk and pixel_refine as peers write them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RADIUS, BETA, LOG2_STEPS = 5, 10.0, 8  # IRN's
DILATIONS, ITERATIONS = (1, 2, 4, 8, 12, 24), 10  # PAR's, and the next line's
COLOUR_SCALE, POSITION_WEIGHT = 0.3, 0.01


# -- random_walk: (cams [k,h,w], edge [h,w]) -> [k,h,w] ----------------------------------------------------------------


def pairs(edge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(source, destination, affinity) of all pairs of neighbours, one way: IRN's path index."""
    h, w = edge.shape
    cells = torch.arange(h * w, device=edge.device).view(h, w)
    found = []
    for dy in range(RADIUS):
        for dx in range(1 - RADIUS, RADIUS):
            if (dy == 0 and dx <= 0) or dy * dy + dx * dx >= RADIUS**2:
                continue
            left, right = max(0, -dx), w - max(0, dx)
            path = [
                edge[y : h - dy + y, left + x : right + x]
                for y in range(dy + 1)
                for x in range(min(dx, 0), max(dx, 0) + 1)
                if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
            ]
            affinity = (1 - torch.stack(path).amax(0)) ** BETA
            ends = cells[: h - dy, left:right], cells[dy:, left + dx : right + dx]
            found.append([t.flatten() for t in (*ends, affinity)])
    source, destination, affinity = (torch.cat(t) for t in zip(*found, strict=True))
    return source, destination, affinity


def transition(edge: Tensor) -> Tensor:  # [h·w,h·w]
    source, destination, affinity = pairs(edge)
    matrix = torch.eye(edge.numel(), device=edge.device)
    matrix[source, destination] = matrix[destination, source] = affinity
    return matrix.div_(matrix.sum(0))


def walk_dense(cams: Tensor, edge: Tensor) -> Tensor:
    matrix = transition(edge)
    for _ in range(LOG2_STEPS):
        matrix = matrix @ matrix
    return ((cams * (1 - edge)).flatten(1) @ matrix).view_as(cams)


def walk_sparse(cams: Tensor, edge: Tensor) -> Tensor:
    source, destination, affinity = pairs(edge)
    n = edge.numel()
    itself = torch.arange(n, device=edge.device)
    rows, columns = torch.cat([source, destination, itself]), torch.cat([destination, source, itself])
    values = torch.cat([affinity, affinity, torch.ones_like(itself, dtype=edge.dtype)])
    total = torch.zeros(n, device=edge.device).index_add_(0, rows, values)
    matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), values / total[rows], (n, n))
    matrix = matrix.coalesce().to_sparse_csr()
    walked = (cams * (1 - edge)).flatten(1).T.contiguous()  # [h·w,k]
    for _ in range(2**LOG2_STEPS):
        walked = matrix @ walked
    return walked.T.reshape(cams.shape)


def walk_scipy(cams: Tensor, edge: Tensor) -> Tensor:
    """The sparse walk with scipy's matrices."""
    from scipy.sparse import coo_array, eye_array

    source, destination, affinity = (t.cpu().numpy() for t in pairs(edge))
    n = edge.numel()
    one_way = coo_array((affinity, (source, destination)), shape=(n, n))
    matrix = (one_way + one_way.T + eye_array(n, dtype=affinity.dtype)).tocsr()
    matrix = matrix.multiply(1 / matrix.sum(0)[:, None]).tocsr()  # symmetric so far: rows as columns
    walked = (cams * (1 - edge)).flatten(1).T.contiguous().cpu().numpy()  # [h·w,k]
    for _ in range(2**LOG2_STEPS):
        walked = matrix @ walked
    return torch.from_numpy(walked.T.copy()).view(cams.shape).to(cams)


# -- pixel_refine: (images [B,3,H,W], masks [B,k,h,w]) -> [B,k,H,W] ----------------------------------------------------


def gathered(maps: Tensor) -> Tensor:  # [B,c,H,W] -> [B,c,N,H,W]
    b, c, h, w = maps.shape
    kernels = torch.eye(9, device=maps.device)[[0, 1, 2, 3, 5, 6, 7, 8]].view(8, 1, 3, 3)
    found = []
    for d in DILATIONS:
        padded = F.pad(maps, [d] * 4, mode="replicate").flatten(0, 1)[:, None]
        found.append(F.conv2d(padded, kernels, dilation=d).view(b, c, 8, h, w))
    return torch.cat(found, 2)


def refine_par(images: Tensor, masks: Tensor) -> Tensor:
    masks = F.interpolate(masks, size=images.shape[-2:], mode="bilinear", align_corners=True)
    colours = gathered(images)
    spread = torch.std(colours, dim=2, keepdim=True) + 1e-8
    colour = -(((colours - images[:, :, None]).abs() / spread / COLOUR_SCALE) ** 2)
    corners = torch.tensor([2.0, 1, 2, 1, 1, 2, 1, 2], device=images.device).sqrt()
    distance = torch.cat([corners * d for d in DILATIONS])[:, None, None]
    position = -((distance / (distance.std() + 1e-8) / COLOUR_SCALE) ** 2)
    affinity = colour.mean(1, keepdim=True).softmax(2) + POSITION_WEIGHT * position.softmax(0)
    for _ in range(ITERATIONS):
        masks = (gathered(masks) * affinity).sum(2)
    return masks

"""MAM, the Multi-scale Attentive Module: MainNet's CAMs at each scale learn from SupportNet's at all scales."""

from __future__ import annotations

from torch import Tensor

from pssl.config import MAMConfig
from pssl_ext import cam_compare


def mam_loss(
    main: dict[float, Tensor],  # scale -> [B,K,h_s,w_s]
    support: dict[float, Tensor],  # scale -> [B,K,h_t,w_t]
    image_labels: Tensor,  # [B,K]
    size: tuple[int, int],
    config: MAMConfig,
) -> Tensor:
    """L1 between MainNet's CAMs and the attended mean of SupportNet's, a scalar (paper, section 3).

    Per present class, with all maps resized to `size` (the grid of scale 1) and cut at 0:
    sum_s mean |M_s - mean_t w_st S_t|, w_st = 2 - cos(M_s, S_t). The less two maps agree, the larger the target, so
    CAMs grow where only some scales respond. `config.pairs` says which t there are for an s.
    """
    if config.pairs == "all":
        groups = [(list(main.values()), list(support.values()))]
    else:
        groups = [([cam], [support[t] for t in config.partners(s, list(support))]) for s, cam in main.items()]
    losses = [
        cam_compare(seen, aims, image_labels, size=size, attention=config.attention) for seen, aims in groups
    ]
    return sum(losses[1:], losses[0])

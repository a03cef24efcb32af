"""pssl: weakly supervised semantic segmentation from image-level labels, with pixel-level self-supervision.

The method is that of Yoon et al., *Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation*
(arXiv 2112.05351). Each stage is a command: ``python -m pssl.train``, ``python -m pssl.cams``,
``python -m pssl.evaluate``. The operators are those of :mod:`pssl_ext`.
"""

"""How to cite the papers whose methods are here."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe_hf import __version__


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv.

    Args:
        authors: in BibTeX's form, "Family, Given and Family, Given".
        title: in full.
        year: of its first version.
        venue: where it was published since.
    """

    authors: str
    title: str
    year: int
    venue: str | None = None


PAPERS: dict[str, Paper] = {
    "1701.06538": Paper(
        "Shazeer, N. and Mirhoseini, A. and Maziarz, K. and Davis, A. and Le, Q. and Hinton, G. and Dean, J.",
        "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        2017,
        "ICLR 2017",
    ),
    "2101.03961": Paper(
        "Fedus, W. and Zoph, B. and Shazeer, N.",
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
        2021,
    ),
    "2403.07652": Paper(
        "Huang, Quzhe and An, Zhenwei and Zhuang, Nan and Tao, Mingxu and Zhang, Chen and Jin, Yang and Xu, Kun and "
        "Xu, Kun and Chen, Liwei and Huang, Songfang and Feng, Yansong",
        "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
        2024,
        "ACL 2024",
    ),
    "2408.06793": Paper(
        "Qiu, Z. and Huang, Z. and Cheng, S. and Zhou, Y. and Wang, Z. and Titov, I. and Fu, J.",
        "Layerwise Recurrent Router for Mixture-of-Experts",
        2024,
        "ICLR 2025",
    ),
    "2409.06669": Paper(
        "Aghdam, Maryam Akhavan and Jin, Hongpeng and Wu, Yanzhao",
        "DA-MoE: Towards Dynamic Expert Allocation for Mixture-of-Experts Models",
        2024,
    ),
    "2410.16077": Paper(
        "Su, Zhenpeng and Wu, Xing and Lin, Zijia and Xiong, Yizhe and Lv, Minxuan and Ma, Guangyuan and Chen, Hui and "
        "Hu, Songlin and Ding, Guiguang",
        "CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in Mixture-of-Experts",
        2024,
        "NAACL 2025",
    ),
    "2501.13074": Paper(
        "Lv, Ang and Xie, Ruobing and Qian, Yining and Wu, Songhao and Sun, Xingwu and Kang, Zhanhui and Wang, Di and "
        "Yan, Rui",
        "Autonomy-of-Experts Models",
        2025,
        "ICML 2025",
    ),
    "2512.13996": Paper(
        "Jin, C. and Peng, H. and Xiang, M. and Zhang, Q. and Yuan, X. and Hasan, A. and Dibua, O. and Gong, Y. and "
        "Kang, Y. and Metaxas, D. N.",
        "DTop-p MoE: Sparsity-Controlled Dynamic Top-p MoE for Foundation Model Pre-training",
        2025,
    ),
}


def bibtex(arxiv_id: str) -> str:
    """The BibTeX entry of a paper. KeyError for one that is not in `PAPERS`."""
    paper = PAPERS[arxiv_id]
    family = paper.authors.partition(",")[0].lower()
    fields = {
        "title": f"{{{paper.title}}}",
        "author": paper.authors,
        "year": str(paper.year),
        "eprint": arxiv_id,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{arxiv_id}",
    }
    if paper.venue:
        fields["note"] = paper.venue
    return _entry(f"@misc{{{family}{paper.year}_{arxiv_id.replace('.', '_')}", fields)


def package_bibtex() -> str:
    """The BibTeX entry of this package, with what CITATION.cff says."""
    fields = {
        "title": "{dynmoe_hf}",
        "author": "{The dynmoe_hf developers}",
        "note": f"Version {__version__}, Apache-2.0",
    }
    return _entry("@misc{dynmoe_hf", fields)


def _entry(head: str, fields: dict[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"{head},", *lines, "}"])

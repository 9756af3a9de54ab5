"""Every method and every named variant, in sizes that fit the tiny model of `zoo`: 4 layers; 12 -> 12, 18 and 18 -> 12.

Methods with factors have rank 5 where they can choose, because equal shapes share one compiled model.
"""

from jaxpeft.methods import METHODS, lora, mos, prolora

ROTATION = {"rank": 5, "unshared_rank": 1, "sharing_in": 3, "sharing_out": 3}
ALL_SHARED = {"rank": None, "equivalent_rank": 2, "private_rank": 0, "shards_per_vector": 1}

SPECS = {
    "lora": lora.Spec(rank=5),
    "mos": mos.Spec(rank=5, equivalent_rank=2, private_rank=1, shards_per_vector=3),
    "mos all private": mos.Spec(rank=2, equivalent_rank=2, private_rank=2, shards_per_vector=2),
    "mos -pd": mos.Spec(rank=5, equivalent_rank=2, shards_per_vector=3, pair_dissociation=False),
    "mos -vs": mos.Spec(rank=5, equivalent_rank=2, shards_per_vector=1),
    "mos -sp": mos.Spec(rank=7, equivalent_rank=2, private_rank=0, shards_per_vector=3),
    "mos subset selection": mos.Spec(
        rank=7, equivalent_rank=2, private_rank=0, shards_per_vector=1, pair_dissociation=False
    ),
    "mos pure sharing": mos.Spec(**ALL_SHARED),
    "mos random scaling": mos.Spec(**ALL_SHARED, scaling="frozen"),
    "mos trained scaling": mos.Spec(**ALL_SHARED, scaling="trained"),
    "prolora": prolora.Spec(**ROTATION),
    "prolora unexpanded": prolora.Spec(**ROTATION, expand=False),
    "prolora unexpanded, unequal": prolora.Spec(rank=5, unshared_rank=0, sharing_in=4, sharing_out=2, expand=False),
    "prolora unequal": prolora.Spec(rank=5, unshared_rank=1, sharing_in=5, sharing_out=2),
    "prolora all unshared": prolora.Spec(rank=3, unshared_rank=3, sharing_in=2, sharing_out=2),
    "prolora clora": prolora.Spec(**{**ROTATION, "unshared_rank": 0}, rotate=False),
    "prolora rolora": prolora.Spec(**{**ROTATION, "unshared_rank": 0}),
    "prolora -r": prolora.Spec(**ROTATION, rotate=False),
    "prolora -i": prolora.Spec(**ROTATION, rectified_init=False),
    "prolora share rank": prolora.Spec(**ROTATION, share_along="rank", rotate_along="rank"),
    "prolora share rank rotate hidden": prolora.Spec(**ROTATION, share_along="rank", rotate_along="hidden"),
    "prolora rotate hidden": prolora.Spec(**ROTATION, rotate_along="hidden"),
}
"""A method's own name is its main setting; its variants begin with that name."""

FOR_TWO_LAYERS = {"mos": mos.Spec(rank=3, equivalent_rank=2, private_rank=1, shards_per_vector=3)}
"""Main settings that do not fit two layers, and what to test there instead."""

STRUCTURES = {"prolora unexpanded"}
"""Variants whose updates have another structure than their method's main setting: they go through every check too."""

MAIN = {name: spec for name, spec in SPECS.items() if name in METHODS or name in STRUCTURES}

"""What can a chip do, by its maker's figures?"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip: upper bounds that real programs approach from below.

    Attributes:
      name: as in the name of a topology.
      hbm_bytes: main memory. A TPU's compiler keeps a part of it, 0.25 GiB of a v5e: it says itself what does not fit.
      hbm_bandwidth: bytes a second to and from main memory.
      flops: bf16 multiplications and additions a second, of dense matrices.
      link_bandwidth: bytes a second that a chip can send over all of its links together, in one direction.
      devices: JAX devices of one chip: two where the cores of a chip do not work as one.
    """

    name: str
    hbm_bytes: float
    hbm_bandwidth: float
    flops: float
    link_bandwidth: float
    devices: int = 1

    @property
    def per_device(self) -> "Chip":
        """The share of one JAX device.

        Examples:
          >>> CHIPS["tpu7x"].per_device.hbm_bytes / GIB
          96.0
        """
        figures = (self.hbm_bytes, self.hbm_bandwidth, self.flops, self.link_bandwidth)
        return Chip(self.name, *(figure / self.devices for figure in figures))


# Of the TPUs, the tables "System architecture" of cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x, which give
# the bandwidth of the links in both directions together: half of it is here. That of v4, six links of 50 GB/s in each
# direction, is from Jouppi et al. 2023, "TPU v4", arXiv:2304.01433, table 4. Two devices of a v4 chip are how its
# topology is described to the compiler; a real v4 may also run both cores as one device ("megacore").
# Of the H100 SXM, nvidia.com/en-us/data-center/h100: 1,979 TFLOP/s is with sparsity, twice the dense figure, and the
# 900 GB/s of NVLink are both directions. NVLink ends at the host.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 1200e9, 275e12, 300e9, devices=2),
        Chip("v5e", 16 * GIB, 819e9, 197e12, 400e9 / 2),
        Chip("v5p", 95 * GIB, 2765e9, 459e12, 1200e9 / 2),
        Chip("v6e", 32 * GIB, 1638e9, 918e12, 800e9 / 2),
        Chip("tpu7x", 192 * GIB, 7380e9, 2307e12, 1200e9 / 2, devices=2),
        Chip("H100 SXM", 80e9, 3350e9, 1979e12 / 2, 900e9 / 2),
    )
}

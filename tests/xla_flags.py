"""XLA's flags for programs that run once: compiling them takes most of the time of the tests.

Without fusion emitters, which lower each fusion through MLIR, it takes a third less; without LLVM's optimizations
another third. Results differ in last bits from those of a program that is compiled for use.
"""

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"

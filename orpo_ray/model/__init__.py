import logging

# On CPUs with bfloat16 instructions, bitsandbytes advises to install a package that would load kernels from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

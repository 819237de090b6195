"""zbench: where does decode time go, and would speculation or diffusion really help, on this device?"""

__version__ = "0.1.0"
MOST_THREADS = 4096  # that can be asked for: more than any machine has CPUs, and torch cannot count them all

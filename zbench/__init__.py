"""zbench: where does decode time go, and would speculation or diffusion really help, on this device?"""

__version__ = "0.1.0"

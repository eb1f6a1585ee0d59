"""Laws are drawn by hypothesis without a deadline: no test here depends on how busy the machine is."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

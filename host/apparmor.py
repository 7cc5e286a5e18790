"""AppArmor: whether the kernel has the profile of instances (systemd/faas-instance.apparmor; install.sh loads it)."""

import contextlib

PROFILE = 'faas-instance'
PROFILES = '/sys/kernel/security/apparmor/profiles'  # a line for each: NAME (MODE)


def loaded() -> str | None:
    """The name of the profile, or None when it is not loaded or there is no AppArmor."""
    with contextlib.suppress(OSError), open(PROFILES) as file:
        if any(line.startswith(f'{PROFILE} (') for line in file):
            return PROFILE
    return None

"""What is taken from undocumented places of accelerate (1.10.1 and 1.15.0 were run)."""

from accelerate.commands.launch import launch_command, launch_command_parser

__all__ = ["launch_command", "launch_command_parser"]

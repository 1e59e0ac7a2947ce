"""Runs functions as programs of their own without each loading torch: forks of one process that has loaded it.

    python tests/doctor/failing.py --each FOLDER NAME NAME=ARGUMENT ...

Each fork ends as a program does, its traceback included, and writes into FOLDER/NAME.log. Their exit codes are printed.
"""

import json
import os
import sys


def main(programs, arguments):
    """`programs` are functions by their names; `arguments` as above, or NAME [ARGUMENT] for one program."""
    if arguments[0] != "--each":
        return programs[arguments[0]](*arguments[1:])
    import torch  # noqa: F401
    import transformers  # noqa: F401

    folder, codes = arguments[1], {}
    for name, *argument in (word.split("=", 1) for word in arguments[2:]):
        child = os.fork()
        if not child:
            log = os.open(os.path.join(folder, f"{name}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            return programs[name](*argument)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stdout.write(json.dumps(codes))

"""The cell in which generated code runs. tasks/sandbox.py is the door; nobody else imports from here.

landlock.py    which files a program may reach: the rule set of a kernel's Landlock
seccomp.py     which system calls it may make: the filter, as BPF
bubblewrap.py  the same for files where Landlock is missing, through bwrap
scratch.py     the directory it may write to, and the sweeping of dead runs
process.py     starts one interpreter, talks to it, ends it: what came of it
tiers.py       which of these mechanisms have an effect here, found out by trying
child.py       the program of that interpreter: confines itself, then runs candidate and tests
oracle.py      its other program: the strict re-check, in two interpreters that exchange data only
"""

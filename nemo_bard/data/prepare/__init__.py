"""``nemo-bard data prepare``: from a mixture file to a prepared folder, in parallel and resumable.

``mix`` reads the file, ``plan`` finds the units of work, ``unit`` does one of them (in a worker of ``workers``), ``fold`` puts
finished units together in order, ``folder`` knows what lies where, ``run`` does it all.
"""

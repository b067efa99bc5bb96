"""A table of results that grows by a run at a time."""
import csv


def read(path):
    """Its lines, each a dict."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def append(path, rows):
    """Lines for `rows`, dicts with the same keys; a new file gets a header first."""
    with path.open("a", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        if f.tell() == 0:
            out.writeheader()
        out.writerows(rows)

"""Takes over what notebook 05 measured on this machine, for readers to see before they run it.

python tools/saved_result.py
"""

from helpers.measuring.streaming import read_result
from helpers.measuring.streaming.result import PACKAGED
from helpers.notebook import connect

if __name__ == "__main__":
    read_result(connect().gs("tuning", "result.json")).save(PACKAGED)
    print(f"Written: {PACKAGED.name}")

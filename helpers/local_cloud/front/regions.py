"""The regions of Google Cloud: https://cloud.google.com/about/locations"""

_NUMBERS = {  # from an area to the numbers of its regions
    "africa-south": "1",
    "asia-east": "1 2",
    "asia-northeast": "1 2 3",
    "asia-south": "1 2",
    "asia-southeast": "1 2 3",
    "australia-southeast": "1 2",
    "europe-central": "2",
    "europe-north": "1 2",
    "europe-southwest": "1",
    "europe-west": "1 2 3 4 6 8 9 10 12",
    "me-central": "1 2",
    "me-west": "1",
    "northamerica-northeast": "1 2",
    "northamerica-south": "1",
    "southamerica-east": "1",
    "southamerica-west": "1",
    "us-central": "1",
    "us-east": "1 4 5",
    "us-south": "1",
    "us-west": "1 2 3 4",
}
REGIONS = frozenset(f"{area}{number}" for area, numbers in _NUMBERS.items() for number in numbers.split())

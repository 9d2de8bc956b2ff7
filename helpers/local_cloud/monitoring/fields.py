"""Which fields of Cloud Monitoring's requests are honoured here; every other is refused."""

from ..front.fields import fields

TABLES = {
    # There is one series and one point at most: one page, in any order, with or without its data.
    "ListTimeSeries": fields("name filter interval view", "order_by page_size page_token"),
}

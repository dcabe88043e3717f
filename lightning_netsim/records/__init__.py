"""What a run leaves on disk: tables, how they are written and read, and what they tell of samples and classes."""

from lightning_netsim.records.record import Record, newest_record, read_record, write_record

__all__ = ["Record", "newest_record", "read_record", "write_record"]

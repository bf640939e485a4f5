from typing import Any


def write_report(config: Any, layouts: Any) -> None:
    print("report: to come")

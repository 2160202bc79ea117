module t5-serve/tests/cluster/pause

go 1.26

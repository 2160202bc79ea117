-- At which hours of which weekdays is the service used? Hours are UTC, weekday 1 is Monday.
CREATE OR REPLACE VIEW t5_requests.calls_by_weekday_hour AS
SELECT
  -- 1970-01-05 was a Monday.
  MOD(DATE_DIFF(DATE(time), DATE '1970-01-05', DAY), 7) + 1 AS weekday,
  EXTRACT(HOUR FROM time) AS hour,
  COUNT(*) AS calls,
  COUNT(DISTINCT DATE(time)) AS days,
  ROUND(COUNT(*) / COUNT(DISTINCT DATE(time)), 2) AS calls_per_day
FROM t5_requests.requests
WHERE is_call
GROUP BY 1, 2
ORDER BY weekday, hour;

-- Which share of the calls succeeds, hour by hour? A stream that ended in an error did not.
CREATE OR REPLACE VIEW t5_requests.success_per_hour AS
SELECT
  TIMESTAMP_TRUNC(time, HOUR) AS hour,
  COUNT(*) AS calls,
  COUNTIF(succeeded) AS succeeded,
  COUNTIF(NOT succeeded AND NOT server_error) AS client_errors,
  COUNTIF(server_error) AS server_errors,
  ROUND(COUNTIF(succeeded) / COUNT(*), 4) AS success_rate,
  ROUND(COUNTIF(server_error) / COUNT(*), 4) AS error_rate
FROM t5_requests.requests
WHERE is_call
GROUP BY 1
ORDER BY hour;

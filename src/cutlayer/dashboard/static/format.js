// Numbers to texts for people. It touches no page.

export function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(count) < 1000) return unit === "B" ? `${Math.round(count)} B` : `${count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}

export function count(value) {
  return Math.round(value).toLocaleString("en");
}

export function number(value) {
  if (value === null) return "not finite";
  return Math.abs(value) >= 1e5 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
}

export function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

export function ago(thenSeconds, nowSeconds) {
  if (thenSeconds === null) return "never";
  const seconds = nowSeconds - thenSeconds;
  return seconds < 3 ? "now" : `${duration(Math.round(seconds))} ago`;
}

export function clock(seconds) {
  if (seconds === null) return "–";
  return new Date(seconds * 1000).toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

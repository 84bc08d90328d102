//! Figures as text.

use std::time::Duration;

/// The value below which this share of sorted values lies; `None` without values.
pub(crate) fn quantile<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get((last as f64 * share).round() as usize).copied()
}

/// Median, 99th percentile and worst.
pub(crate) fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let shown = |share| {
        let time = quantile(&times, share);
        time.map_or_else(|| "unknown".to_owned(), |time| format!("{:.1} ms", time.as_secs_f64() * 1e3))
    };
    format!("median {}, 99 % {}, worst {}", shown(0.5), shown(0.99), shown(1.0))
}

/// What a page of metrics says was lost.
pub(crate) fn losses(metrics: &str) -> String {
    let lines = metrics.lines().filter_map(|line| line.strip_prefix("memtrace_lost_total{what=\""));
    let lost: Vec<String> = lines.filter(|line| !line.ends_with(" 0")).map(|line| line.replace("\"}", "")).collect();
    if lost.is_empty() { "none".to_owned() } else { lost.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_there() {
        assert_eq!(quantile::<u8>(&[], 0.5), None);
        assert_eq!(quantile(&[1, 2, 9], 0.5), Some(2));
        assert_eq!(quantile(&[1, 2, 9], 1.0), Some(9));
        let times = [5, 1, 3].map(Duration::from_millis).to_vec();
        assert_eq!(spread(times), "median 3.0 ms, 99 % 5.0 ms, worst 5.0 ms");
    }

    #[test]
    fn losses_are_those_that_are_not_0() {
        let text = "memtrace_lost_total{what=\"a/b\"} 0\nmemtrace_lost_total{what=\"c/d\"} 3\nother 1\n";
        assert_eq!(losses(text), "c/d 3");
        assert_eq!(losses("x 1\n"), "none");
    }
}

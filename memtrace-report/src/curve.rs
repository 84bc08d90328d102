//! Which part of the timeline to draw, and the values of each column of the plot.
//!
//! A kill after a slow leak needs minutes on the axis, a burst needs milliseconds. So the overview
//! covers the rise or 10 s, whichever is longer, and a rise that would be a few columns wide in it
//! gets a second plot of its own.

use memtrace_incident::Columns;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
/// Lengths of time that give round numbers on an axis, ascending.
const ROUND_NS: [u64; 16] = [
    10 * MS,
    20 * MS,
    50 * MS,
    100 * MS,
    200 * MS,
    500 * MS,
    SECOND,
    2 * SECOND,
    5 * SECOND,
    10 * SECOND,
    20 * SECOND,
    30 * SECOND,
    60 * SECOND,
    120 * SECOND,
    300 * SECOND,
    600 * SECOND,
];

/// A part of the boot clock that a plot covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DrawnSpan {
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
    /// The moment labelled 0: the event, or the start of a recording.
    pub(super) zero_ns: u64,
}

impl DrawnSpan {
    /// At least 1, so that it can be divided by.
    pub(super) fn length_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns).max(1)
    }
}

/// The values of one reading, or of one column of a plot; `None` is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CurveLevel {
    pub(super) usage_bytes: Option<u64>,
    pub(super) anon_bytes: Option<u64>,
    pub(super) limit_bytes: Option<u64>,
}

/// The spans to draw around `at_ns`: the overview, and a shorter one if the rise takes less than a
/// fifth of the overview. Each goes on for at most `after_ns` after `at_ns`.
pub(super) fn choose_spans(columns: &Columns, at_ns: u64, after_ns: u64) -> (DrawnSpan, Option<DrawnSpan>) {
    let history = rows(columns).map(|(boot_ns, _)| boot_ns).filter(|boot_ns| *boot_ns <= at_ns).min();
    let history = at_ns.saturating_sub(history.unwrap_or(at_ns));
    let rise = rise_ns(columns, at_ns);
    let wanted = round_up(rise.unwrap_or(0)).max(10 * SECOND).min(round_up(history));
    let window = |span: u64, after: u64| DrawnSpan {
        start_ns: at_ns.saturating_sub(span),
        end_ns: at_ns.saturating_add(after),
        zero_ns: at_ns,
    };
    let overview = window(wanted, after_ns.min(wanted / 5));
    let closer = rise.map(|rise| round_up(rise.saturating_add(rise / 4)).max(100 * MS));
    let closer = closer.filter(|closer| closer.saturating_mul(5) <= wanted);
    (overview, closer.map(|span| window(span, after_ns.min(span))))
}

/// Distance of ticks on a time axis in nanoseconds, round and so that at most `most` fit in `span`.
pub(super) fn tick_ns(span: u64, most: u64) -> u64 {
    let wanted = (span / most.max(1)).max(1);
    let decimal = (0..11).flat_map(|power| [1, 2, 5].map(|digit| digit * 10u64.pow(power)));
    let minutes = [1, 2, 5, 10, 20, 30, 60, 120, 360, 720].map(|minutes| minutes * 60 * SECOND);
    // 1, 2, 4, .. days.
    let days = (0..10).map(|power| (86_400 * SECOND) << power);
    let round = decimal.take_while(|step| *step < 60 * SECOND).chain(minutes).chain(days).find(|step| *step >= wanted);
    round.unwrap_or(wanted)
}

/// Time from the start of the rise to `at_ns`, nanoseconds; `None` if nothing rose. The rise starts
/// at the reading after the last one that was within a tenth of the lowest value. That reading and
/// not the one before, because readings are taken when memory moves: a value holds until the next.
pub(super) fn rise_ns(columns: &Columns, at_ns: u64) -> Option<u64> {
    let before = || rows(columns).filter(|(boot_ns, _)| *boot_ns <= at_ns);
    let read = || before().filter_map(|(boot_ns, level)| Some((boot_ns, level.usage_bytes.or(level.anon_bytes)?)));
    let (low, high) = (read().map(|(_, usage)| usage).min()?, read().map(|(_, usage)| usage).max()?);
    let begun = low.saturating_add((high - low) / 10);
    let last = read().filter(|(_, usage)| *usage <= begun).map(|(boot_ns, _)| boot_ns).max()?;
    let first = read().map(|(boot_ns, _)| boot_ns).filter(|boot_ns| *boot_ns > last).min().unwrap_or(last);
    (high > low).then(|| at_ns.saturating_sub(first))
}

/// The span as `count` columns. Each has the highest usage of its time, so that a short peak is
/// visible; without a reading it has the value of the reading before.
pub(super) fn resample(columns: &Columns, window: &DrawnSpan, count: usize) -> Vec<CurveLevel> {
    let span = u128::from(window.length_ns());
    let mut carried = CurveLevel::default();
    let mut carried_at = 0;
    let mut bins: Vec<(CurveLevel, CurveLevel)> = vec![Default::default(); count];
    for (boot_ns, level) in rows(columns) {
        if boot_ns > window.end_ns {
            continue;
        }
        if boot_ns <= window.start_ns {
            if boot_ns >= carried_at {
                carried = level.or_from(carried);
                carried_at = boot_ns;
            }
            continue;
        }
        let offset = u128::from(boot_ns - window.start_ns - 1);
        let bin = usize::try_from(offset * count as u128 / span).unwrap_or(usize::MAX).min(count.saturating_sub(1));
        if let Some((highest, last)) = bins.get_mut(bin) {
            *highest = level.highest(*highest);
            *last = level.or_from(*last);
        }
    }
    bins.into_iter()
        .map(|(highest, last)| {
            let shown = highest.highest(carried);
            carried = last.or_from(carried);
            // The limit is a setting and has no peak: the one at the end of the column is drawn.
            CurveLevel { limit_bytes: carried.limit_bytes, ..shown }
        })
        .collect()
}

impl CurveLevel {
    /// The known values of `self`, the others from `before`.
    fn or_from(self, before: Self) -> Self {
        Self {
            usage_bytes: self.usage_bytes.or(before.usage_bytes),
            anon_bytes: self.anon_bytes.or(before.anon_bytes),
            limit_bytes: self.limit_bytes.or(before.limit_bytes),
        }
    }

    /// The reading with the higher usage, together with its anon; unknown values come from the
    /// other.
    fn highest(self, other: Self) -> Self {
        if self.usage_bytes.or(self.anon_bytes) > other.usage_bytes.or(other.anon_bytes) {
            self.or_from(other)
        } else {
            other.or_from(self)
        }
    }
}

fn rows(columns: &Columns) -> impl Iterator<Item = (u64, CurveLevel)> {
    columns.boot_ns.iter().enumerate().map(|(row, boot_ns)| {
        let level = CurveLevel {
            usage_bytes: columns.usage_bytes.get(row).copied().flatten(),
            anon_bytes: columns.anon_bytes.get(row).copied(),
            limit_bytes: columns.limit_bytes.get(row).copied().flatten(),
        };
        (*boot_ns, level)
    })
}

fn round_up(span: u64) -> u64 {
    ROUND_NS.into_iter().find(|round| *round >= span).unwrap_or(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(rows: &[(u64, u64)]) -> Columns {
        Columns {
            boot_ns: rows.iter().map(|(ms, _)| ms * MS).collect(),
            usage_bytes: rows.iter().map(|(_, usage)| Some(*usage)).collect(),
            ..Columns::default()
        }
    }

    #[test]
    fn a_burst_gets_a_closer_look() {
        let burst = columns(&[(0, 10), (9_000, 10), (19_800, 60), (19_900, 200), (20_000, 400)]);
        assert_eq!(rise_ns(&burst, 20_000 * MS), Some(200 * MS));
        let (overview, closer) = choose_spans(&burst, 20_000 * MS, 0);
        assert_eq!(overview.length_ns(), 10 * SECOND);
        assert_eq!(closer.unwrap().length_ns(), 500 * MS);
    }

    #[test]
    fn a_slow_rise_gets_a_longer_window() {
        let slow: Vec<(u64, u64)> = (0..30).map(|second| (60_000 + second * 1000, second * 10)).collect();
        let (overview, closer) = choose_spans(&columns(&slow), 89_000 * MS, 0);
        assert_eq!((overview.length_ns(), closer), (30 * SECOND, None));
    }

    #[test]
    fn a_short_history_is_not_stretched() {
        let short = columns(&[(19_300, 10), (20_000, 400)]);
        assert_eq!(choose_spans(&short, 20_000 * MS, 0).0.length_ns(), SECOND);
        assert_eq!(choose_spans(&Columns::default(), SECOND, SECOND).0.length_ns(), 12 * MS);
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(tick_ns(10 * SECOND, 8), 2 * SECOND);
        assert_eq!(tick_ns(500 * MS, 3), 200 * MS);
        assert_eq!(tick_ns(42_300 * MS, 8), 10 * SECOND);
        assert_eq!(tick_ns(3_600 * SECOND, 5), 1_200 * SECOND);
        for most in [0, 1, 7, u64::MAX] {
            assert!(tick_ns(u64::MAX, most) > 0 && tick_ns(0, most) > 0);
        }
    }

    #[test]
    fn a_column_is_its_highest_and_holds() {
        let window = DrawnSpan { start_ns: 0, end_ns: 4 * MS, zero_ns: 4 * MS };
        let data = columns(&[(0, 5), (1, 9), (4, 1)]);
        let usage: Vec<Option<u64>> = resample(&data, &window, 4).iter().map(|level| level.usage_bytes).collect();
        assert_eq!(usage, [Some(9), Some(9), Some(9), Some(9)]);
        let unknown = resample(&columns(&[(3, 2)]), &window, 4);
        assert_eq!(unknown.iter().map(|level| level.usage_bytes).collect::<Vec<_>>(), [None, None, Some(2), Some(2)]);
    }
}

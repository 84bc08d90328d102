//! The timeline cut into windows: which stretch to show, and what each column of a plot stands for.

use memtrace_incident::Columns;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
/// DrawnSpan lengths that read well on an axis.
const NICE: [u64; 16] = [
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

/// A stretch of the boot clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DrawnSpan {
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
    /// Where the axis says 0.
    pub(super) zero_ns: u64,
}

impl DrawnSpan {
    pub(super) fn length_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns).max(1)
    }
}

/// What is known of one moment or one column of a plot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CurveLevel {
    pub(super) usage_bytes: Option<u64>,
    pub(super) anon_bytes: Option<u64>,
    pub(super) limit_bytes: Option<u64>,
}

/// Windows up to `at_ns`: the overview, and a closer look when the rise is hard to see in it.
pub(super) fn windows(columns: &Columns, at_ns: u64, after_ns: u64) -> (DrawnSpan, Option<DrawnSpan>) {
    let history = rows(columns).map(|(boot_ns, _)| boot_ns).filter(|boot_ns| *boot_ns <= at_ns).min();
    let history = at_ns.saturating_sub(history.unwrap_or(at_ns));
    let rise = rise_ns(columns, at_ns);
    let wanted = nice_at_least(rise.unwrap_or(0)).max(10 * SECOND).min(nice_at_least(history));
    let window = |span: u64, after: u64| DrawnSpan {
        start_ns: at_ns.saturating_sub(span),
        end_ns: at_ns.saturating_add(after),
        zero_ns: at_ns,
    };
    let overview = window(wanted, after_ns.min(wanted / 5));
    // A tenth of the overview or less is a few columns of it.
    let closer = rise.map(|rise| nice_at_least(rise.saturating_add(rise / 4)).max(100 * MS));
    let closer = closer.filter(|closer| closer.saturating_mul(5) <= wanted);
    (overview, closer.map(|span| window(span, after_ns.min(span))))
}

/// Distance of ticks on a time axis: at most `most` of them in `span`.
pub(super) fn tick_ns(span: u64, most: u64) -> u64 {
    let wanted = (span / most.max(1)).max(1);
    let decimal = (0..11).flat_map(|power| [1, 2, 5].map(|digit| digit * 10u64.pow(power)));
    let minutes = [1, 2, 5, 10, 20, 30, 60, 120, 360, 720].map(|minutes| minutes * 60 * SECOND);
    // A day and its doubles.
    let days = (0..10).map(|power| (86_400 * SECOND) << power);
    let nice = decimal.take_while(|step| *step < 60 * SECOND).chain(minutes).chain(days).find(|step| *step >= wanted);
    nice.unwrap_or(wanted)
}

/// From the first reading of the rise to the event (more than a tenth of it was done, for good) to the event: a value
/// holds until the next reading, because readings are taken when memory moves.
pub(super) fn rise_ns(columns: &Columns, at_ns: u64) -> Option<u64> {
    let before = || rows(columns).filter(|(boot_ns, _)| *boot_ns <= at_ns);
    let read = || before().filter_map(|(boot_ns, level)| Some((boot_ns, level.usage_bytes.or(level.anon_bytes)?)));
    let (low, high) = (read().map(|(_, usage)| usage).min()?, read().map(|(_, usage)| usage).max()?);
    let begun = low.saturating_add((high - low) / 10);
    let last = read().filter(|(_, usage)| *usage <= begun).map(|(boot_ns, _)| boot_ns).max()?;
    let first = read().map(|(boot_ns, _)| boot_ns).filter(|boot_ns| *boot_ns > last).min().unwrap_or(last);
    (high > low).then(|| at_ns.saturating_sub(first))
}

/// The window as `count` columns: each the highest usage in its time, a value holding until the next reading.
pub(super) fn sample(columns: &Columns, window: &DrawnSpan, count: usize) -> Vec<CurveLevel> {
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
                carried = level.over(carried);
                carried_at = boot_ns;
            }
            continue;
        }
        let offset = u128::from(boot_ns - window.start_ns - 1);
        let bin = usize::try_from(offset * count as u128 / span).unwrap_or(usize::MAX).min(count.saturating_sub(1));
        if let Some((highest, last)) = bins.get_mut(bin) {
            *highest = level.highest(*highest);
            *last = level.over(*last);
        }
    }
    bins.into_iter()
        .map(|(highest, last)| {
            let shown = highest.highest(carried);
            carried = last.over(carried);
            // The limit is a setting, not a peak: the one in force at the end of the column.
            CurveLevel { limit_bytes: carried.limit_bytes, ..shown }
        })
        .collect()
}

impl CurveLevel {
    /// What `self` knows, the rest from `before`.
    fn over(self, before: Self) -> Self {
        Self {
            usage_bytes: self.usage_bytes.or(before.usage_bytes),
            anon_bytes: self.anon_bytes.or(before.anon_bytes),
            limit_bytes: self.limit_bytes.or(before.limit_bytes),
        }
    }

    /// The reading with the higher usage; its anon belongs to it.
    fn highest(self, other: Self) -> Self {
        if self.usage_bytes.or(self.anon_bytes) > other.usage_bytes.or(other.anon_bytes) {
            self.over(other)
        } else {
            other.over(self)
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

fn nice_at_least(span: u64) -> u64 {
    NICE.into_iter().find(|nice| *nice >= span).unwrap_or(span)
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
        let (overview, closer) = windows(&burst, 20_000 * MS, 0);
        assert_eq!(overview.length_ns(), 10 * SECOND);
        assert_eq!(closer.unwrap().length_ns(), 500 * MS);
    }

    #[test]
    fn a_slow_rise_gets_a_longer_window() {
        let slow: Vec<(u64, u64)> = (0..30).map(|second| (60_000 + second * 1000, second * 10)).collect();
        let (overview, closer) = windows(&columns(&slow), 89_000 * MS, 0);
        assert_eq!((overview.length_ns(), closer), (30 * SECOND, None));
    }

    #[test]
    fn a_short_history_is_not_stretched() {
        let short = columns(&[(19_300, 10), (20_000, 400)]);
        assert_eq!(windows(&short, 20_000 * MS, 0).0.length_ns(), SECOND);
        assert_eq!(windows(&Columns::default(), SECOND, SECOND).0.length_ns(), 12 * MS);
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
        let usage: Vec<Option<u64>> = sample(&data, &window, 4).iter().map(|level| level.usage_bytes).collect();
        assert_eq!(usage, [Some(9), Some(9), Some(9), Some(9)]);
        let unknown = sample(&columns(&[(3, 2)]), &window, 4);
        assert_eq!(unknown.iter().map(|level| level.usage_bytes).collect::<Vec<_>>(), [None, None, Some(2), Some(2)]);
    }
}

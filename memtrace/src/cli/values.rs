//! Values that people type, on the command line and in the configuration file: sizes (`450M`, `256KiB`), time spans
//! (`30s`, `250ms`, `2d`) and shares of a CPU (`1%`).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A size in bytes. `K`, `M`, `G`, `T` are powers of 1024, with or without `iB` or `B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A time span. Units: `ns`, `us`, `ms`, `s`, `m`, `h`, `d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A share of one CPU's time, in parts per million. Written in percent, with or without the sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(pub u64);

/// Splits `12.5M` into its number and its unit.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let number: f64 = number.parse().ok()?;
    number.is_finite().then(|| (number, unit.trim()))
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size: write bytes or a number with K, M, G or T, such as 450M");
        let (number, unit) = split(text).ok_or_else(wrong)?;
        let unit = unit.to_ascii_lowercase();
        let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit) {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(wrong()),
        };
        let bytes = number * (1u64 << shift) as f64;
        // Above 2^53 a float skips integers; no machine has that much.
        if !(0.0..9.0e15).contains(&bytes) {
            return Err(wrong());
        }
        Ok(Self(bytes as u64))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a time span: write a number with ms, s, m, h or d, such as 30s");
        let (number, unit) = split(text).ok_or_else(wrong)?;
        let seconds = match unit {
            "ns" => 1e-9,
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return Err(wrong()),
        };
        // A century is more than any window or retention needs.
        let span = number * seconds;
        if !(0.0..3.2e9).contains(&span) {
            return Err(wrong());
        }
        Duration::try_from_secs_f64(span).map(Self).map_err(|_| wrong())
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a share of one CPU: write percent from 0 to 100, such as 1%");
        let (number, unit) = split(text).ok_or_else(wrong)?;
        if !(0.0..=100.0).contains(&number) || !matches!(unit, "" | "%") {
            return Err(wrong());
        }
        Ok(Self((number * 10_000.0) as u64))
    }
}

impl Span {
    /// Nanoseconds, saturated.
    pub fn nanoseconds(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        match units.iter().find(|(shift, _)| self.0 > 0 && self.0.trailing_zeros() >= *shift) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.nanoseconds();
        let units = [
            (86_400_000_000_000, "d"),
            (3_600_000_000_000, "h"),
            (60_000_000_000, "m"),
            (1_000_000_000, "s"),
            (1_000_000, "ms"),
            (1, "ns"),
        ];
        match units.iter().find(|(unit, _)| nanoseconds > 0 && nanoseconds.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", nanoseconds / unit),
            None => write!(f, "0s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("450M", 450 << 20), ("1.5GiB", 3 << 29), ("256 KB", 256 << 10), ("1t", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "12X", "-1", "1e400", "99999999T", "1..2", "NaN", "∞"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn spans() {
        for (text, ms) in [("0s", 0), ("250ms", 250), ("1.5s", 1500), ("2m", 120_000), ("1d", 86_400_000)] {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(ms))), "{text}");
        }
        for text in ["", "10", "s", "5 weeks", "-1s", "1e20d"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_shown_reads_back(bytes in 0u64..1 << 50, ns in 0u64..1 << 50) {
            proptest::prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
            let span = Span(Duration::from_nanos(ns));
            let back: Span = span.to_string().parse().unwrap();
            proptest::prop_assert!(back.0.abs_diff(span.0) < Duration::from_micros(1));
        }

        #[test]
        fn nothing_typed_panics(text in ".*") {
            let _ = text.parse::<Size>();
            let _ = text.parse::<Span>();
        }
    }

    #[test]
    fn shares() {
        for (text, ppm) in [("1%", 10_000), ("0.5 %", 5000), ("0", 0), ("100%", 1_000_000)] {
            assert_eq!(text.parse(), Ok(Share(ppm)), "{text}");
        }
        for text in ["", "101%", "-1%", "1x", "NaN"] {
            assert!(text.parse::<Share>().unwrap_err().contains("1%"), "{text}");
        }
    }
}

//! Whether differences grow with time: a straight line fitted through them, and the error of its
//! slope. Pure.

/// A line fitted by least squares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct FittedLine {
    /// Slope, units a second.
    pub(super) per_s: f64,
    /// Standard error of the slope.
    pub(super) error_per_s: f64,
}

/// Fits a line to (seconds, value). `None` for fewer than three points, or if all are at one time.
pub(super) fn fit(points: &[(f64, f64)]) -> Option<FittedLine> {
    let count = points.len() as f64;
    if points.len() < 3 {
        return None;
    }
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (middle_s, middle) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|(s, _)| (s - middle_s).powi(2)).sum();
    if spread <= 0.0 {
        return None;
    }
    let per_s = points.iter().map(|(s, value)| (s - middle_s) * (value - middle)).sum::<f64>() / spread;
    let left: f64 = points.iter().map(|(s, value)| (value - middle - per_s * (s - middle_s)).powi(2)).sum();
    Some(FittedLine { per_s, error_per_s: (left / (count - 2.0) / spread).sqrt() })
}

impl FittedLine {
    /// Whether the values drift by no more than `quantum` in `seconds`. `None` if two standard
    /// errors leave that open.
    pub(super) fn stays(&self, seconds: f64, quantum: f64) -> Option<bool> {
        let (moved, unsure) = (self.per_s.abs() * seconds, 2.0 * self.error_per_s * seconds);
        if moved + unsure <= quantum {
            Some(true)
        } else if moved - unsure > quantum {
            Some(false)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_and_its_error_with_it() {
        let straight: Vec<(f64, f64)> = (0..100).map(|s| (f64::from(s), 7.0 + 3.0 * f64::from(s))).collect();
        let line = fit(&straight).unwrap();
        assert!((line.per_s - 3.0).abs() < 1e-9 && line.error_per_s < 1e-9, "{line:?}");
        assert_eq!((line.stays(100.0, 250.0), line.stays(100.0, 350.0)), (Some(false), Some(true)));
        // up and down without a trend
        let noise: Vec<(f64, f64)> = (0..100).map(|s| (f64::from(s), f64::from((s % 2) * 1000))).collect();
        let line = fit(&noise).unwrap();
        assert_eq!((line.stays(100.0, 1.0), line.stays(100.0, 10_000.0)), (None, Some(true)), "{line:?}");
    }

    #[test]
    fn too_few_points_are_no_line() {
        assert_eq!(fit(&[(0.0, 1.0), (1.0, 2.0)]), None);
        assert_eq!(fit(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]), None);
    }
}

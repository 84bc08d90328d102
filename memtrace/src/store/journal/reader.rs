//! Reads a journal back: every input in order, and what is missing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Decoder, Step, Stop, sequence};
use memtrace_engine::input::Input;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// What a reading met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Segments read.
    pub segments: u64,
    /// Frames that checked out.
    pub frames: u64,
    /// Frames skipped because this build does not know their kind or content.
    pub unknown_frames: u64,
    /// Segments that ended in a torn frame.
    pub torn_segments: u64,
    /// Bytes given up in them.
    pub torn_bytes: u64,
    /// Segments missing between the first and the last: gaps in the sequence.
    pub missing_segments: u64,
}

/// Why a journal cannot be read at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file or directory cannot be read.
    #[error("failed to read journal {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory has no segments.
    #[error("failed to read journal {}: no journal-*.mtj segments in it", path.display())]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// The file does not begin like a segment.
    #[error("failed to read journal {}: not a memtrace journal", path.display())]
    NotAJournal {
        /// Which.
        path: PathBuf,
    },
    /// The file is of a newer version.
    #[error("failed to read journal {}: version {version} is newer than this memtrace reads ({}); update memtrace", path.display(), super::VERSION)]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// Reads the segments of a directory, or one segment, as inputs.
#[derive(Debug)]
pub struct Reader {
    /// Still to be read, last first.
    segments: Vec<PathBuf>,
    /// One file was named: it has to be a journal.
    single: bool,
    current: Option<Current>,
    /// Whether the segment being read is where this reading begins: only its preamble counts.
    begins: bool,
    stats: Stats,
    chunk: Vec<u8>,
}

#[derive(Debug)]
struct Current {
    path: PathBuf,
    file: File,
    decoder: Decoder,
    ended: bool,
}

impl Reader {
    /// Opens a directory of segments or one segment file.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let mut stats = Stats::default();
        let single = !fs::metadata(path).map_err(io)?.is_dir();
        let mut segments = vec![path.to_owned()];
        if !single {
            let mut found = Vec::new();
            for entry in fs::read_dir(path).map_err(io)? {
                let entry = entry.map_err(io)?;
                if let Some(sequence) = entry.file_name().to_str().and_then(sequence) {
                    found.push((sequence, entry.path()));
                }
            }
            found.sort_unstable();
            if let (Some((first, _)), Some((last, _))) = (found.first(), found.last()) {
                stats.missing_segments = (last - first).saturating_sub(found.len() as u64 - 1);
            } else {
                return Err(OpenError::Empty { path: path.to_owned() });
            }
            segments = found.into_iter().rev().map(|(_, path)| path).collect();
        }
        Ok(Self { segments, single, current: None, begins: true, stats, chunk: vec![0; CHUNK_BYTES] })
    }

    /// The next input; `None` at the end. After an error the next segment is tried.
    pub fn next_input(&mut self) -> Result<Option<Input<'_>>, OpenError> {
        let step = loop {
            let Some(current) = &mut self.current else {
                if !self.open_next()? {
                    return Ok(None);
                }
                continue;
            };
            match current.decoder.advance() {
                Some(Step::Preamble(_)) if !self.begins => {}
                Some(step) => break step,
                None if current.ended => self.close()?,
                None => {
                    if let Err(source) = current.fill(&mut self.chunk) {
                        let path = current.path.clone();
                        self.current = None;
                        return Err(OpenError::Io { path, source });
                    }
                }
            }
        };
        Ok(match step {
            Step::Fact(fact) | Step::Preamble(fact) => Some(Input::Fact(fact)),
            Step::Record => self.current.as_ref().map(|current| Input::Record(current.decoder.record())),
        })
    }

    /// What was met so far; complete after [`Reader::next_input`] returned `None`.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    fn open_next(&mut self) -> Result<bool, OpenError> {
        let Some(path) = self.segments.pop() else {
            return Ok(false);
        };
        match File::open(&path) {
            Ok(file) => {
                self.current = Some(Current { path, file, decoder: Decoder::new(), ended: false });
                Ok(true)
            }
            // A running agent has deleted it since the directory was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.single => {
                self.stats.missing_segments += 1;
                Ok(true)
            }
            Err(source) => Err(OpenError::Io { path, source }),
        }
    }

    fn close(&mut self) -> Result<(), OpenError> {
        let Some(current) = self.current.take() else {
            return Ok(());
        };
        let decoder = &current.decoder;
        self.stats.segments += 1;
        self.stats.frames += decoder.frames();
        self.stats.unknown_frames += decoder.unknown();
        self.stats.torn_bytes += decoder.torn_bytes();
        // An empty or unreadable segment is not where the reading begins.
        self.begins &= decoder.frames() == 0;
        match decoder.stopped() {
            Some(Stop::Newer(version)) => return Err(OpenError::Newer { path: current.path, version }),
            Some(Stop::NotAJournal) if self.single => return Err(OpenError::NotAJournal { path: current.path }),
            Some(_) => self.stats.torn_segments += 1,
            None => {}
        }
        Ok(())
    }
}

impl Current {
    fn fill(&mut self, chunk: &mut [u8]) -> io::Result<()> {
        let read = loop {
            match self.file.read(chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        match chunk.get(..read) {
            Some(bytes) if !bytes.is_empty() => self.decoder.push(bytes),
            _ => {
                self.decoder.finish();
                self.ended = true;
            }
        }
        Ok(())
    }
}

//! Reads a journal: every input in order, and what is missing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::super::own_dir;
use super::{DecodedFrame, SegmentDecoder, SegmentEnd, sequence};
use memtrace_engine::input::Input;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// What was read of a journal, and what is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalStats {
    /// Segments read.
    pub segments: u64,
    /// Valid frames.
    pub frames: u64,
    /// Valid frames that were skipped because this build does not know their kind or content.
    pub unknown_frames: u64,
    /// Segments that end in a torn frame.
    pub torn_segments: u64,
    /// Bytes of these that could not be decoded.
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
        /// Path of the journal.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There are no segments in the directory.
    #[error("failed to read journal {}: no journal-*.mtj segments in it", path.display())]
    Empty {
        /// Path of the journal.
        path: PathBuf,
    },
    /// The file does not begin with [`super::MAGIC`].
    #[error("failed to read journal {}: not a memtrace journal", path.display())]
    NotAJournal {
        /// Path of the journal.
        path: PathBuf,
    },
    /// The file has a newer format.
    #[error("failed to read journal {}: version {version} is newer than this memtrace reads ({}); update memtrace", path.display(), super::VERSION)]
    Newer {
        /// Path of the journal.
        path: PathBuf,
        /// Version of the file.
        version: u32,
    },
}

/// Reads a directory of segments, or one segment, as inputs of the engine.
#[derive(Debug)]
pub struct JournalReader {
    /// Segments still to be read, the next one last. Cap: the files of the directory.
    segments: Vec<PathBuf>,
    /// A single file was named: if it is not a journal, that is an error.
    single: bool,
    current: Option<Current>,
    /// No frame of an earlier segment was read: the preamble of this segment is input.
    begins: bool,
    stats: JournalStats,
    chunk: Vec<u8>,
}

#[derive(Debug)]
struct Current {
    path: PathBuf,
    file: File,
    decoder: SegmentDecoder,
    ended: bool,
}

impl JournalReader {
    /// Opens a directory of segments or one segment file.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let mut stats = JournalStats::default();
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

    /// The next input; `None` at the end. After an error the call can be repeated: it goes on with the next segment.
    pub fn next_input(&mut self) -> Result<Option<Input<'_>>, OpenError> {
        let step = loop {
            let Some(current) = &mut self.current else {
                if !self.open_next()? {
                    return Ok(None);
                }
                continue;
            };
            match current.decoder.advance() {
                Some(DecodedFrame::Preamble(_)) if !self.begins => {}
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
            DecodedFrame::Fact(fact) | DecodedFrame::Preamble(fact) => Some(Input::Fact(fact)),
            DecodedFrame::Record => self.current.as_ref().map(|current| Input::Record(current.decoder.record())),
        })
    }

    /// What was read so far; complete once [`JournalReader::next_input`] has returned `None`.
    pub fn stats(&self) -> JournalStats {
        self.stats
    }

    fn open_next(&mut self) -> Result<bool, OpenError> {
        let Some(path) = self.segments.pop() else {
            return Ok(false);
        };
        // A single one may be a pipe that its user has made.
        let opened = if self.single { File::open(&path) } else { own_dir::read(&path) };
        match opened {
            Ok(file) => {
                self.current = Some(Current { path, file, decoder: SegmentDecoder::new(), ended: false });
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
        // After an empty or unreadable segment the next preamble counts.
        self.begins &= decoder.frames() == 0;
        match decoder.stopped() {
            Some(SegmentEnd::Newer(version)) => return Err(OpenError::Newer { path: current.path, version }),
            Some(SegmentEnd::NotAJournal) if self.single => return Err(OpenError::NotAJournal { path: current.path }),
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

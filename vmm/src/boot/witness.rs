//! Umbra's own look at memory that the guest has checked: regions named by the guest, hashed by us.
//!
//! Story: at the end of a run the table that the image's note points to is read, and every region's frames are
//! hashed in their order. A guest that lies about its contents, or whose memory we lost, is found out.
//!
//! Limits: [`REGIONS_MAX`] regions, [`PAGES_MAX`] pages in all; a table that claims more is an error, so that a
//! hostile guest cannot keep us hashing.
//!
//! See: `umbra_guest::abi` for the layout. The checksum is zlib's CRC-32.

use umbra_guest::abi;
use umbra_mmu::{Gfn, Gpa, PAGE_SIZE};

use super::load::MemoryError;

/// The most regions of a table.
pub const REGIONS_MAX: u32 = abi::WITNESS_REGIONS_MAX;
/// The most pages of all regions together: 256 MiB.
pub const PAGES_MAX: u32 = 1 << 16;

/// Frame numbers that are read at a time.
const GFNS_AT_ONCE: u32 = 256;

const NAME_BYTES: usize = abi::WITNESS_NAME_BYTES as usize;
const REGION_BYTES: usize = abi::WITNESS_REGION_BYTES as usize;

/// One region, and what is true of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Witness {
    /// The guest's name for it; what is not printable ASCII shows as '?'.
    pub name: String,
    /// How many pages it has.
    pub pages: u32,
    /// The checksum that the guest computed.
    pub claimed: u32,
    /// The checksum that we computed.
    pub computed: u32,
}

impl Witness {
    /// True if the guest's checksum is ours.
    pub fn agrees(&self) -> bool {
        self.claimed == self.computed
    }
}

/// Why the regions could not be hashed.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// The table's first word is wrong.
    #[error("no witness table at guest-physical {table}: its first word is {found:#x} and not {magic:#x}", magic = abi::WITNESS_MAGIC)]
    NoTable {
        /// Where the note says that it is.
        table: Gpa,
        /// What is there.
        found: u32,
    },
    /// Over [`REGIONS_MAX`].
    #[error("the witness table claims {count} regions; {REGIONS_MAX} are allowed")]
    TooManyRegions {
        /// How many.
        count: u32,
    },
    /// Over [`PAGES_MAX`] with this one.
    #[error("the witness region '{name}' claims {pages} pages; all regions together may have {PAGES_MAX}")]
    TooManyPages {
        /// The region.
        name: String,
        /// How many.
        pages: u32,
    },
    /// Guest memory could not be read.
    #[error("reading {what} at guest-physical {gpa} failed")]
    Read {
        /// What was being read.
        what: String,
        /// Where.
        gpa: Gpa,
        /// Why.
        source: MemoryError,
    },
}

/// Reads guest memory from an address on; a buffer never crosses a frame unless its address is in the table or a
/// list of frame numbers.
pub type Reader<'a> = &'a mut dyn FnMut(Gpa, &mut [u8]) -> Result<(), MemoryError>;

/// A region as the table has it.
struct Claim {
    name: String,
    pages: u32,
    crc32: u32,
    gfn_list: Gpa,
}

fn word(bytes: &[u8], offset: u32) -> u32 {
    let at = offset as usize;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn read_at(
    read: Reader<'_>,
    gpa: Gpa,
    buffer: &mut [u8],
    what: impl FnOnce() -> String,
) -> Result<(), WitnessError> {
    read(gpa, buffer).map_err(|source| WitnessError::Read { what: what(), gpa, source })
}

/// Reads the table at `table` and hashes every region that it names.
pub fn check(table: Gpa, read: Reader<'_>) -> Result<Vec<Witness>, WitnessError> {
    let claims = read_table(table, read)?;
    let mut budget = PAGES_MAX;
    let mut witnesses = Vec::with_capacity(claims.len());
    for claim in claims {
        budget = budget
            .checked_sub(claim.pages)
            .ok_or_else(|| WitnessError::TooManyPages { name: claim.name.clone(), pages: claim.pages })?;
        let computed = hash(&claim, read)?;
        witnesses.push(Witness { name: claim.name, pages: claim.pages, claimed: claim.crc32, computed });
    }
    Ok(witnesses)
}

fn read_table(table: Gpa, read: Reader<'_>) -> Result<Vec<Claim>, WitnessError> {
    let mut head = [0; abi::WITNESS_OFFSET_REGIONS as usize];
    read_at(read, table, &mut head, || "the witness table".into())?;
    let found = word(&head, abi::WITNESS_OFFSET_MAGIC);
    if found != abi::WITNESS_MAGIC {
        return Err(WitnessError::NoTable { table, found });
    }
    let count = word(&head, abi::WITNESS_OFFSET_COUNT);
    if count > REGIONS_MAX {
        return Err(WitnessError::TooManyRegions { count });
    }
    let mut bytes = vec![0; REGION_BYTES * count as usize];
    let first = Gpa(table.0 + u64::from(abi::WITNESS_OFFSET_REGIONS));
    if count != 0 {
        read_at(read, first, &mut bytes, || "the witness table's regions".into())?;
    }
    Ok(bytes.chunks_exact(REGION_BYTES).map(Claim::read).collect())
}

impl Claim {
    fn read(bytes: &[u8]) -> Claim {
        let name = &bytes[abi::WITNESS_REGION_NAME as usize..][..NAME_BYTES];
        let printable = |&byte: &u8| if byte.is_ascii_graphic() || byte == b' ' { byte.into() } else { '?' };
        Claim {
            name: name.iter().take_while(|&&byte| byte != 0).map(printable).collect(),
            pages: word(bytes, abi::WITNESS_REGION_PAGES),
            crc32: word(bytes, abi::WITNESS_REGION_CRC32),
            gfn_list: Gpa(word(bytes, abi::WITNESS_REGION_GFN_LIST).into()),
        }
    }
}

/// The checksum of a region's frames in their order.
fn hash(claim: &Claim, read: Reader<'_>) -> Result<u32, WitnessError> {
    let mut hasher = crc32fast::Hasher::new();
    let mut list = [0; 4 * GFNS_AT_ONCE as usize];
    let mut page = [0; PAGE_SIZE as usize];
    for first in (0..claim.pages).step_by(GFNS_AT_ONCE as usize) {
        let gfns = &mut list[..4 * GFNS_AT_ONCE.min(claim.pages - first) as usize];
        let gpa = Gpa(claim.gfn_list.0 + 4 * u64::from(first));
        read_at(read, gpa, gfns, || format!("the frame list of witness region '{}'", claim.name))?;
        for gfn in gfns.chunks_exact(4).map(|bytes| Gfn(word(bytes, 0))) {
            let what = || format!("a frame of witness region '{}'", claim.name);
            read_at(read, gfn.at(0), &mut page, what)?;
            hasher.update(&page);
        }
    }
    Ok(hasher.finalize())
}

//! What the control socket asks of a balloon device.

/// A guest's balloon, as an operator has it. Called on the event loop's thread: nothing here may sleep.
pub trait BalloonControl: Send + Sync {
    /// Asks the guest to keep no more than `bytes` of its memory. It does so in its own time, and `News::balloon_changed`
    /// tells of it.
    ///
    /// # Errors
    ///
    /// A sentence that says why that cannot be asked.
    fn set_target(&self, bytes: u64) -> Result<(), String>;

    /// What the guest has of its memory now, in bytes.
    fn actual_bytes(&self) -> u64;

    /// All of the guest's memory, in bytes.
    fn memory_bytes(&self) -> u64;

    /// Pages that the guest is to have given up, and that it says it has.
    fn pages(&self) -> (u32, u32);

    /// What the guest last said of its memory; `None` before it has.
    fn stats(&self) -> Option<Vec<(&'static str, u64)>>;
}
